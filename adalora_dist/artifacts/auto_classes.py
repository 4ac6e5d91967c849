"""Which of transformers' Auto classes loads a model, by the end of the name of the model's own class, and how."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}


def auto_class(model_class: object, unknown: str) -> str:
    """The name of the Auto class; ``unknown`` for a class of none of these kinds."""
    return next((auto for end, auto in _AUTO_CLASSES.items() if str(model_class).endswith(end)), unknown)


def label_options(task: Mapping[str, Any], base: str, revision: str | None) -> str:
    """What a classifier's base is to be loaded with for an adapter of this task: ", num_labels=2", say; "" for others.

    A base that classifies already, with another number of labels, would be refused without one more option.

    Args:
        task: from task.json.
        base: a folder, or an id whose config.json counts if it is on this machine.
    """
    from transformers import AutoConfig

    classes = task.get("id2label")
    if not classes or auto_class((task.get("architectures") or [""])[0], "") != "AutoModelForSequenceClassification":
        return ""
    options = f", num_labels={len(classes)}"
    try:
        own = AutoConfig.from_pretrained(base, revision=revision, local_files_only=True, trust_remote_code=False)
    except Exception:  # not on this machine, or code from a repository
        return options
    is_other = bool(own.num_labels != len(classes))
    return options + ", ignore_mismatched_sizes=True" * is_other
