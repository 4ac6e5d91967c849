"""Every field of PEFT's ``AdaLoraConfig`` and ``LoraConfig``: what it is called here, or that it is not honoured.

PEFT is not imported.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from adalora_dist.config.foreign_names import SAME
from adalora_dist.io.errors import UserError

SAME_OF_LORA = {"r": "init_rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"}
"""Those of a ``LoraConfig``, which has no budget."""
AS_PEFT_DOES = {"start": "paper", "orthogonality_form": "norm", "importance_order": "after"}
"""What PEFT's AdaLoRA does without a field for it."""
TRANSLATED = ("target_modules", "modules_to_save", "task_type", "init_lora_weights")
UNUSED = {
    "total_step": "the schedule has the length of the run itself",
    "r": "neither does PEFT: init_r is the rank",
    "use_rslora": "neither does PEFT's AdaLoRA: pass rslora=True for that scale",
}
"""Fields without an effect, named if they are set."""
OF_FILES = ("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode")
SELF_EVIDENT = ("fan_in_fan_out", "runtime_config", "megatron_core", "qalora_group_size")
"""Seen from the model itself, about memory alone, or without a meaning on their own."""
IN_LAYERS = (
    *("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("init_lora_weights",),
)
"""Which have had their effect once a model carries the layers: on which modules, of which rank, from which start."""

_BUDGETS = ("target_rank", "target_budget")
_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks whose head PEFT trains in full without being asked to."""


class Carried(NamedTuple):
    """What layers of PEFT's in a model say, whatever the configuration that they were made from says of it."""

    names: Sequence[str]
    """Of the adapted matrices, in the plain model."""
    trained: Sequence[str]
    """Of the modules that are trained in full."""
    rank: int
    """The highest."""


def settings_from_peft(peft_config: Any, given: dict[str, Any], carried: Carried | None = None) -> dict[str, Any]:
    """Settings of the method adalora that mean what a ``peft.AdaLoraConfig`` says, or a ``peft.LoraConfig``, which
    needs a budget besides.

    Fields that have no effect are named in one warning.

    Args:
        given: settings that the caller sets himself; they count, whatever ``peft_config`` says.
        carried: of the model whose layers were made from ``peft_config``.

    Raises:
        UserError: it is another configuration, or one without a budget; fields that change the function and are not
            honoured are set; all of them in one line.
    """
    kind = kind_of(peft_config)
    if kind not in ("ADALORA", "LORA") or (kind == "LORA" and given.keys().isdisjoint(_BUDGETS)):
        raise UserError(
            f"from_peft needs a peft.AdaLoraConfig, not a {type(peft_config).__name__}: for LoRA write "
            "AdaLoraConfig.from_peft(peft_config, target_rank=...), a budget below its r"
        )
    refuse_fields(peft_config, is_carried=carried is not None)
    same = SAME if kind == "ADALORA" else SAME_OF_LORA
    settings: dict[str, Any] = {ours: getattr(peft_config, theirs) for theirs, ours in same.items()}
    if kind == "ADALORA":
        changed = _changed(peft_config)
        if unused := [f"{name}={changed[name]!r} ({why})" for name, why in UNUSED.items() if name in changed]:
            warnings.warn(f"peft_config: not honoured: {', '.join(unused)}", stacklevel=3)
        settings |= AS_PEFT_DOES
    trained = _train_modules(peft_config) if carried is None else tuple(carried.trained)
    if trained:
        settings["train_modules"] = trained
    if carried is not None:
        settings |= {"targets": tuple(carried.names)}
    elif "targets" not in given:
        settings["targets"] = _targets(peft_config.target_modules)
    if given.get("start") == "matched":  # its own regulariser
        settings.pop("orthogonality_form", None)
    if given.get("importance") == "magnitude":  # which has no averages
        settings.pop("importance_order", None)
    if (rank := given.get("init_rank", carried and carried.rank)) and "alpha" not in given:  # at the same scale
        ratio = rank / settings["init_rank"]
        settings |= {"init_rank": rank, "alpha": settings["alpha"] * ratio ** (0.5 if settings.get("rslora") else 1)}
    return settings | given


def kind_of(peft_config: Any) -> str:
    """LORA, ADALORA, or another of PEFT's types; empty: it is no configuration of PEFT's."""
    kind = getattr(peft_config, "peft_type", None)
    return str(getattr(kind, "value", kind)) if _is_dataclass(peft_config) else ""


def refuse_fields(peft_config: Any, is_carried: bool) -> None:
    """Refuse what changes the function and is not honoured.

    Args:
        is_carried: by a model whose layers are looked at themselves.

    Raises:
        UserError: naming every such field.
    """
    known = {*SAME, *SAME_OF_LORA, *TRANSLATED, *UNUSED, *OF_FILES, *SELF_EVIDENT, *(IN_LAYERS if is_carried else ())}
    refused = {name: value for name, value in _changed(peft_config).items() if name not in known}
    if peft_config.init_lora_weights is not True and not is_carried:
        refused["init_lora_weights"] = peft_config.init_lora_weights
    if refused:
        listed = ", ".join(f"{name}={value!r:.40}" for name, value in sorted(refused.items()))
        raise UserError(f"peft_config sets what is not honoured here: {listed}: leave it out")


def _changed(peft_config: Any) -> dict[str, Any]:
    fields = ((field, getattr(peft_config, field.name)) for field in dataclasses.fields(peft_config))
    return {field.name: value for field, value in fields if value != _default(field)}


def _is_dataclass(config: Any) -> bool:
    return dataclasses.is_dataclass(config)  # said apart, because type checkers would believe that it is nothing else


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _targets(target_modules: Any) -> tuple[str, ...]:
    if target_modules is None:
        raise UserError(
            "peft_config.target_modules is None, by which PEFT chooses modules by the type of the model: pass "
            "targets=(...) with module names, or 'all-linear'"
        )
    return (target_modules,) if isinstance(target_modules, str) else tuple(sorted(target_modules))


def _train_modules(peft_config: Any) -> tuple[str, ...]:
    task = peft_config.task_type
    heads = ("task-head",) if str(getattr(task, "value", task)) in _HEADS else ()
    return tuple(dict.fromkeys([*(peft_config.modules_to_save or ()), *heads]))
