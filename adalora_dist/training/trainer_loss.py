"""Whether transformers' ``Trainer`` multiplies a model's loss.

With several micro-batches in a step, ``Trainer`` hands a model the number of the step's labels, has it divide by that,
and neither divides by the number of micro-batches nor by that of processes. It takes any model whose ``forward`` has
``**kwargs`` for one that does so. Some take the number and ignore it (T5, most classifiers): their loss, and gradients,
grow with accumulation x processes, and with them what clipping leaves of them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from torch import nn

_COUNT = "num_items_in_batch"
_OWN_LOSSES = {"CrossEntropyLoss", "MSELoss", "BCEWithLogitsLoss", "L1Loss", "KLDivLoss", "cross_entropy", "mse_loss"}
_MEANS = ("regression", "multi_label_classification")
"""Problems for which transformers' own loss of classifiers takes a mean, whatever it is told."""


def ignores_number_of_items(model: nn.Module) -> bool:
    """Whether ``Trainer`` takes a model for one that divides by the number of a step's labels, and it does not.

    Read from the source of its ``forward``; a model without source, or whose loss another module computes, is believed.
    """
    if getattr(model, "accepts_loss_kwargs", None) is False:
        return False
    forward = inspect.unwrap(type(model).forward)
    parameters = inspect.signature(forward).parameters
    if "labels" not in parameters or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return False  # nothing is counted, or the number is not handed on
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    if any(isinstance(node, ast.Name | ast.arg) and _COUNT in (getattr(node, "id", ""), getattr(node, "arg", ""))
           for node in ast.walk(tree)):  # fmt: skip
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    through = [call for call in calls if _called(call) == "loss_function"]
    if not through:
        return any(_called(call) in _OWN_LOSSES for call in calls)
    if not any(keyword.arg is None or keyword.arg == _COUNT for call in through for keyword in call.keywords):
        return True
    config: Any = getattr(model, "config", None)
    is_classifier = any(keyword.arg == "pooled_logits" for call in through for keyword in call.keywords)
    return is_classifier and (getattr(config, "problem_type", None) in _MEANS or getattr(config, "num_labels", 2) == 1)


def multiplied_loss(model: nn.Module, num_micro_batches: int, num_processes: int, label_smoothing: float) -> str | None:
    """One line on a loss that this ``Trainer`` multiplies; None where it does not.

    Args:
        num_processes: over which tokens are averaged: 1 with ``average_tokens_across_devices=False``.
    """
    factor = num_micro_batches * num_processes
    if factor == 1 or label_smoothing or not ignores_number_of_items(model):
        return None
    return (
        f"gradient_accumulation_steps={num_micro_batches} on {num_processes} process(es): {type(model).__name__} does "
        f"not divide its loss by the number of a step's labels, as Trainer takes for granted, so that loss and "
        f"gradients are {factor} times too large: set model.accepts_loss_kwargs = False before you make the Trainer"
    )


def _called(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
