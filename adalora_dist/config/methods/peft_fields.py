"""Every field of PEFT's ``AdaLoraConfig``: what it is called here, or that it is not honoured. PEFT is not imported."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from adalora_dist.io.errors import UserError

SAME = {
    "init_r": "init_rank",
    "target_r": "target_rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "tinit": "initial_warmup_steps",
    "tfinal": "final_steps",
    "deltaT": "mask_interval_steps",
    "beta1": "beta1",
    "beta2": "beta2",
    "orth_reg_weight": "orthogonality",
}
"""Fields that mean one thing under two names."""
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

_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks whose head PEFT trains in full without being asked to."""


def settings_from_peft(peft_config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Settings of the method adalora that mean what a ``peft.AdaLoraConfig`` says.

    Fields that have no effect are named in one warning.

    Args:
        given: settings that the caller sets himself; they count, whatever ``peft_config`` says.

    Raises:
        UserError: it is another configuration, or fields that change the function and are not honoured are set; all of
            them in one line.
    """
    kind = getattr(peft_config, "peft_type", None)
    if not _is_dataclass(peft_config) or str(getattr(kind, "value", kind)) != "ADALORA":
        raise UserError(
            f"from_peft needs a peft.AdaLoraConfig, not a {type(peft_config).__name__}: for LoRA write "
            "AdaLoraConfig(init_rank=..., target_rank=..., targets=...) with a budget"
        )
    changed = {
        field.name: value
        for field in dataclasses.fields(peft_config)
        if (value := getattr(peft_config, field.name)) != _default(field)
    }
    known = {*SAME, *TRANSLATED, *UNUSED, *OF_FILES, *SELF_EVIDENT}
    refused = {name: value for name, value in changed.items() if name not in known}
    if peft_config.init_lora_weights is not True:
        refused["init_lora_weights"] = peft_config.init_lora_weights
    if refused:
        listed = ", ".join(f"{name}={value!r:.40}" for name, value in sorted(refused.items()))
        raise UserError(f"peft_config sets what is not honoured here: {listed}: leave it out")
    if unused := [f"{name}={changed[name]!r} ({why})" for name, why in UNUSED.items() if name in changed]:
        warnings.warn(f"peft_config: not honoured: {', '.join(unused)}", stacklevel=3)
    settings = AS_PEFT_DOES | {ours: getattr(peft_config, theirs) for theirs, ours in SAME.items()}
    if trained := _train_modules(peft_config):
        settings["train_modules"] = trained
    if "targets" not in given:
        settings["targets"] = _targets(peft_config.target_modules)
    if given.get("start") == "matched":  # its own regulariser
        del settings["orthogonality_form"]
    return settings | given


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
