"""Which of transformers' Auto classes loads a model, by the end of the name of the model's own class."""

from __future__ import annotations

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
