"""What is answered under a run's settings, and its scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from adalora_dist.tasks.squad.answers import Answer
from adalora_dist.tasks.squad.config import SquadDataConfig
from adalora_dist.tasks.squad.metrics import best_thresholds, squad_scores
from adalora_dist.tasks.squad.rows import Question, Window


def given_answers(data: SquadDataConfig, answers: Sequence[Answer]) -> list[str]:
    """The text that is answered to each question; v2.0: nothing where ``null_threshold`` is exceeded."""
    threshold = data.null_threshold if data.task == "v2.0" else None
    return [answer.given(threshold) for answer in answers]


def windows_loss(windows: Sequence[Window], logits: Sequence[tuple[torch.Tensor, ...]]) -> float:
    """The loss that training has (``span_loss``), mean over windows, from (start, end) logits of their tokens."""
    losses = [
        nn.functional.cross_entropy(values.double()[None], torch.tensor([token])).item() / 2
        for window, pair in zip(windows, logits, strict=True)
        for values, token in zip(pair, window.span, strict=True)
    ]
    return math.fsum(losses) / len(windows)


def score(data: SquadDataConfig, questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, float]:
    """Exact match and F1 of the task; for v2.0 also the best that another threshold could give."""
    right = [question.answers for question in questions]
    scores = squad_scores(data.task, given_answers(data, answers), right)
    if data.task == "v2.0":
        null_scores = [answer.null_score for answer in answers]
        scores |= best_thresholds([answer.text for answer in answers], null_scores, right)
    return scores
