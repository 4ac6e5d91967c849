"""What a DeepSpeed configuration asks for, and what of that a recipe does.

Such files are copied from pages that were written for other programs: ones whose optimizer, rows, logs or checkpoints
were DeepSpeed's. What stands in one is done, or refused in one line, or, where it changes no number of the run, said
not to be used. What asks for nothing (``"enabled": false``, null, an "auto" that nobody fills) is left out: DeepSpeed
and accelerate end with a traceback at some of it. Nothing here imports torch, so that a mistake is told at once.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adalora_dist.config.sections import TrainConfig
from adalora_dist.io.errors import UserError, printable
from adalora_dist.io.foreign_files import read_bytes
from adalora_dist.io.shipped import did_you_mean
from adalora_dist.training.deepspeed_keys import BESIDE, FILLED, IN_ANY_LOOP, KEYS, NOT_USED, REFUSED
from adalora_dist.training.launch import deepspeed_file, is_true, read_configuration

Settings = dict[str, Any]


def is_deepspeed(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return is_true(environment, "ACCELERATE_USE_DEEPSPEED")


def settings_asked_for(environment: Mapping[str, str] = os.environ) -> Settings:
    """What DeepSpeed's configuration asks for, or, without one, accelerate's section; without what asks for nothing.

    Raises:
        UserError: it cannot be read, or asks for what a recipe does not do.
    """
    where, settings = _read(environment)
    settings = dict(_known(settings, "", where))
    if "stage" not in settings.get("zero_optimization", {}):
        raise UserError(
            f'{where}: zero_optimization.stage is missing: add "zero_optimization": {{"stage": 2}}, or 1 or 3'
        )
    _refuse_misfits(settings, settings["zero_optimization"], where)
    return settings


def precision_of(settings: Mapping[str, Any]) -> str:
    """bf16, fp16 or fp32; nothing where the settings leave it to the run.

    Args:
        settings: as :func:`settings_asked_for` gives them.

    Raises:
        UserError: bf16 and fp16 at once.
    """
    asked = {name: settings.get(name, {}).get("enabled", "auto") for name in ("bf16", "fp16")}
    chosen = [name for name, enabled in asked.items() if enabled is True]
    if len(chosen) == 2:
        raise UserError('the DeepSpeed configuration enables bf16 and fp16: write "auto" for one, or for both')
    return chosen[0] if chosen else "fp32" if asked["bf16"] is False else ""


def filled(
    settings: Settings, train: TrainConfig, num_processes: int, num_micro_steps: int, precision: str = ""
) -> Settings:
    """A copy of ``settings`` with the recipe's values, where they leave them to it.

    Args:
        settings: as :func:`settings_asked_for` gives them.
        precision: fp32, bf16 or fp16; empty: not known yet.

    Raises:
        UserError: they have another value.
    """
    num_rows = -(-train.batch_size // (num_processes * num_micro_steps))
    known: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": num_rows,
        "gradient_accumulation_steps": num_micro_steps,
        "train_batch_size": num_rows * num_micro_steps * num_processes,
        "gradient_clipping": train.max_grad_norm,
    }
    stage = settings["zero_optimization"]["stage"]
    if stage == 0 and precision in ("bf16", "fp16"):
        raise UserError(
            f"zero_optimization.stage 0 with precision {precision}: DeepSpeed without ZeRO steps weights of its own; "
            "set the stage to 1, 2 or 3, or launch with launch/accelerate/ddp.yaml"
        )
    if settings["zero_optimization"].get("compute_grad_norm") is False and train.max_grad_norm > 0:
        raise UserError(
            f"zero_optimization.compute_grad_norm false with max_grad_norm {train.max_grad_norm}: clipping needs the "
            "norm; set the one to true, or the other to 0"
        )
    known |= {f"{name}.enabled": precision == name for name in ("bf16", "fp16") if precision and name in settings}
    result = copy.deepcopy(settings)
    for place, value in known.items():
        section, _, name = place.rpartition(".")
        holder = result[section] if section else result
        given = holder.get(name, value)
        if given not in (value, train.batch_size if name == "train_batch_size" else value):
            raise UserError(
                f"the DeepSpeed configuration sets {place}={json.dumps(given)}, the recipe's settings give "
                f'{json.dumps(value)}: write "{place}": "auto"'
            )
        holder[name] = value
    return result


def fill_sizes(zero: Settings, architecture: Any) -> None:
    """Give the "auto" of ``FILLED`` a size where accelerate would end with a traceback: it asks a model's configuration
    for its width, and that of a model of several parts has it in the part for texts.

    Args:
        zero: the section zero_optimization.
        architecture: the model's own configuration.
    """
    if hasattr(architecture, "hidden_size"):
        return
    text = architecture.get_text_config() if hasattr(architecture, "get_text_config") else None
    width: int | None = getattr(text, "hidden_size", None)
    for name in [name for name, value in zero.items() if value == "auto"]:
        if width is None:
            del zero[name]  # DeepSpeed's default
        else:
            zero[name] = 10 * width if "threshold" in name else int((0.9 if "prefetch" in name else 1) * width**2)


def check_in_any_loop(settings: Mapping[str, Any]) -> None:
    """What is refused in loops that are not the recipes', too: there ranks would be wrong, or weights out of reach.

    Args:
        settings: of DeepSpeed, as accelerate has them.

    Raises:
        UserError: they ask for it.
    """
    for place in IN_ANY_LOOP:
        section, _, name = place.rpartition(".")
        holder: Any = settings
        for part in section.split(".") if section else ():
            holder = holder.get(part) or {} if isinstance(holder, Mapping) else {}
        if isinstance(holder, Mapping) and _asks(value := holder.get(name)) and value != "cpu":
            raise UserError(f"DeepSpeed configuration: {_said(place, value)}: must be left out; {IN_ANY_LOOP[place]}")


def not_used(environment: Mapping[str, str] = os.environ) -> list[str]:
    """A line for each setting that changes no number of a run, and is done in another way."""
    where, settings = _read(environment)
    return [f"{where}: {name} is not used: {why}" for name, why in NOT_USED.items() if settings.get(name) is not None]


def _read(environment: Mapping[str, str]) -> tuple[str, Settings]:
    """Whose settings they are, and they themselves, as they stand there."""
    name = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if name == "none":
        return "deepspeed_config of the accelerate configuration", _of_variables(environment)
    beside = set(environment.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")) & BESIDE
    if beside:
        raise UserError(
            f"deepspeed_config of the accelerate configuration has {min(beside)} besides deepspeed_config_file "
            f"{name}: say it in that file, and leave it out here"
        )
    path = deepspeed_file(name)
    settings = read_configuration(path)
    _refuse_twice(path)
    return f"DeepSpeed configuration {path.name}", settings


def _of_variables(environment: Mapping[str, str]) -> Settings:
    """What accelerate makes of its own section."""

    def of(name: str, default: str) -> Any:
        value = environment.get(f"ACCELERATE_{name}", default)
        try:
            return float(value) if "." in value else int(value)
        except ValueError:
            return {"true": True, "false": False}.get(value.lower(), value)

    zero = {
        "stage": of("DEEPSPEED_ZERO_STAGE", "2"),  # accelerate's default
        "offload_optimizer": {"device": of("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")},
        "offload_param": {"device": of("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")},
        "stage3_gather_16bit_weights_on_model_save": of("DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "false"),
    }
    return {
        "gradient_accumulation_steps": of("GRADIENT_ACCUMULATION_STEPS", "auto"),
        "gradient_clipping": of("GRADIENT_CLIPPING", "auto"),
        "zero_optimization": zero,
    }


def _refuse_twice(path: Path) -> None:
    """Of two values that a file has for one setting, readers take the last without a word."""

    def unique(pairs: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in pairs]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise UserError(f"DeepSpeed configuration {path.name}: {printable(twice)} stands there twice: remove one")

    json.loads(read_bytes(path), object_pairs_hook=unique)


def _known(section: Mapping[str, Any], path: str, where: str) -> Iterator[tuple[str, Any]]:
    """What a section asks for, by name."""
    kinds = {name: kind for kind, names in KEYS[path].items() for name in names.split()}
    before = f"{path}." if path else ""
    for name, value in section.items():
        place = before + name
        if place in REFUSED:
            if _asks(value):
                raise UserError(f"{where}: {_said(place, value)}: must be left out; {REFUSED[place]}")
        elif name not in kinds and not name.startswith(("_", "//", "#")) and place not in NOT_USED:
            names = [*kinds, *[other.removeprefix(before) for other in REFUSED if other.startswith(before)]]
            raise UserError(
                f"{where}: {printable(place)} is none of DeepSpeed's settings: {did_you_mean(name, names)}correct it, "
                "or remove it"
            )
        elif name in kinds and value is not None and (value != "auto" or place in FILLED):
            if value != "auto" and not kinds[name].fits(value):
                raise UserError(f"{where}: {_said(place, value)}: must be {kinds[name].said}")
            yield name, dict(_known(value, place, where)) if place in KEYS else value


def _asks(value: Any) -> bool:
    """Whether a setting asks for anything; a size of 1 does not."""
    if isinstance(value, dict):
        return _asks(value["enabled"]) if "enabled" in value else any(map(_asks, value.values()))
    return value is True or value not in (None, False, 0, 1, "auto", "none", "", [])


def _said(place: str, value: Any) -> str:
    return place if isinstance(value, dict | list) else f"{place} {printable(json.dumps(value), 60)}"


def _refuse_misfits(settings: Settings, zero: Settings, where: str) -> None:
    """Raise for what is legal alone, and not together; the optimizer is the recipe's wherever its state lies."""
    devices = {name: zero.get(name, {}).get("device", "none") for name in ("offload_optimizer", "offload_param")}
    for name, first in (("offload_optimizer", 1), ("offload_param", 3)):
        if devices[name] != "none" and zero["stage"] < first:
            raise UserError(
                f"{where}: zero_optimization.{name} with stage {zero['stage']}: it needs stage {first} or above; "
                "set the stage, or remove it"
            )
    if devices["offload_optimizer"] != "none":
        if settings.get("zero_force_ds_cpu_optimizer"):
            raise UserError(
                f"{where}: zero_force_ds_cpu_optimizer true: ranks are allocated in the recipe's own optimizer; "
                "set it to false"
            )
        settings["zero_force_ds_cpu_optimizer"] = False
    scaled = settings.get("prescale_gradients") or settings.get("gradient_predivide_factor", 1) != 1
    if scaled and zero["stage"] and zero.get("reduce_scatter", True):
        raise UserError(
            f"{where}: prescale_gradients or gradient_predivide_factor under ZeRO: leave both out, or set "
            "zero_optimization.reduce_scatter to false"
        )
