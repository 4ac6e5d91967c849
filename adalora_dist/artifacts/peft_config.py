"""What PEFT's ``adapter_config.json`` says of the model and of its matrices, whatever the method."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from adalora_dist.io.redaction import redacted
from adalora_dist.methods.update import Update

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def common_config(
    adapters: Sequence[Update],
    kept: Sequence[Update],
    base_model: str | None,
    base_revision: str | None,
    trained: Mapping[str, torch.Tensor] | None,
    model: PreTrainedModel | None,
) -> dict[str, Any]:
    return {
        "base_model_name_or_path": redacted(base_model),
        "revision": base_revision,
        "target_modules": _exactly([a.name for a in kept], [a.name for a in adapters]),
        "modules_to_save": _whole_modules(trained, model) if trained else None,
        "fan_in_fan_out": any(a.matrix.is_transposed for a in kept),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        **task_of(model),
    }


def task_of(model: PreTrainedModel | None) -> dict[str, Any]:
    """By which ``AutoPeftModelFor*`` finds the base model's class, or ``AutoPeftModel`` where PEFT has no such task."""
    from transformers.models.auto import modeling_auto

    tasks = {
        "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    }
    if model is None:
        return {"task_type": None}
    name = type(model).__name__
    if task := next((task for task, names in tasks.items() if names.get(model.config.model_type) == name), None):
        return {"task_type": task}
    return {"task_type": None, "auto_mapping": {"base_model_class": name, "parent_library": "transformers"}}


def _whole_modules(trained: Mapping[str, torch.Tensor], model: PreTrainedModel | None) -> list[str]:
    """The modules whose tensors ``trained`` has: as large as they come where the whole model is known.

    PEFT saves the modules that it takes for the head (classifier, score, qa_outputs) as a whole.
    """
    leaves = sorted({name.rpartition(".")[0] for name in trained})
    if model is None:
        return leaves
    chosen: list[str] = []
    for name, module in model.named_modules():  # from the top
        parameters = {f"{name}.{leaf}" for leaf, _ in module.named_parameters()} if name else set()
        if parameters and parameters <= trained.keys() and not f"{name}.".startswith(tuple(f"{c}." for c in chosen)):
            chosen.append(name)
    covered = tuple(f"{name}." for name in chosen)
    return sorted([*chosen, *(leaf for leaf in leaves if not f"{leaf}.".startswith(covered))])


def anchored(name: str) -> str:
    """A key that PEFT's ``re.match(rf"(.*\\.)?({key})$", module)`` finds in the module of this name alone."""
    return "^" + re.escape(name)


def _exactly(names: Sequence[str], others: Iterable[str]) -> list[str] | str:
    """``target_modules`` that hit ``names`` alone. PEFT takes a listed name as the end of a longer one, too."""
    if any(other.endswith(f".{name}") for name in names for other in others):
        return "|".join(map(re.escape, names))
    return sorted(names)
