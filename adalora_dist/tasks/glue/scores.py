"""The scores of a GLUE task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from adalora_dist.tasks.glue.metrics import classification_metrics
from adalora_dist.tasks.glue.rows import Task


def score(
    name: str, task: Task, predictions: Sequence[tuple[torch.Tensor, ...]] | float, labels: Sequence[float]
) -> dict[str, float]:
    """``{"dev accuracy": 0.9}``: the task's metrics on the evaluation set ``name``.

    Args:
        predictions: logits of each row, from :func:`predict`; or one label for all rows.
    """
    if isinstance(predictions, float):
        guesses = [predictions] * len(labels)
    elif task.num_labels == 1:
        guesses = [logits.item() for (logits,) in predictions]
    else:
        guesses = [float(logits.argmax()) for (logits,) in predictions]
    return {f"{name} {metric}": v for metric, v in classification_metrics(task.metrics, guesses, labels).items()}


def validation_scores(
    task: Task, predictions: Sequence[tuple[torch.Tensor, ...]], labels: Sequence[float]
) -> dict[str, float]:
    """``loss``, as training has it (the mean over rows), and the task's metrics under their own names."""
    logits = torch.stack([logits for (logits,) in predictions]).double()
    if task.num_labels == 1:
        loss = nn.functional.mse_loss(logits.squeeze(-1), torch.tensor(labels, dtype=torch.float64))
    else:
        loss = nn.functional.cross_entropy(logits, torch.tensor(labels).long())
    scores = score("", task, predictions, labels)
    return {"loss": float(loss), **{name.strip(): value for name, value in scores.items()}}


def majority_scores(task: Task, labels: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The scores of always giving the most frequent label of each evaluation set, by whose names ``labels`` are."""
    scores: dict[str, float] = {}
    for name, values in labels.items():
        most_frequent = max(sorted(set(values)), key=values.count)
        scores |= score(name, task, most_frequent, values)
    return scores
