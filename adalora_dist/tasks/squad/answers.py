"""From start and end logits of windows to one answer per question: n best spans, and 'no answer' by a threshold.

The score of a span is the sum of its start and end logits. Of each window the ``num_best`` best starts and ends are
combined; of all windows of a question the best span with a text wins. 'No answer' scores start + end of [CLS], of the
window in which that is least: the one that believes most in an answer. Where windows overlap, a span counts in each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adalora_dist.tasks.squad.rows import Question, Window


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    ``text`` is the best span's, never empty where the passage has tokens; ``null_score`` by how much 'no answer' scores
    above it; ``best`` the n best as {"text", "score", "probability"}, probabilities over these alone.
    """

    text: str
    null_score: float
    best: list[dict[str, Any]]

    def given(self, threshold: float | None) -> str:
        """What is answered: nothing if ``null_score`` exceeds the threshold; None (v1.1): always the text."""
        return "" if threshold is not None and self.null_score > threshold else self.text


def find_answers(
    questions: Sequence[Question],
    windows: Sequence[Window],
    logits: Sequence[tuple[torch.Tensor, ...]],
    num_best: int,
    max_answer_length: int,
) -> list[Answer]:
    """The answer to every question.

    Args:
        logits: (start, end) of each window's tokens, from :func:`adalora_dist.tasks.evaluation.predict.predict`.
        num_best: starts and ends considered per window, and spans kept per question.
        max_answer_length: longest span in tokens.
    """
    of_question: list[list[int]] = [[] for _ in questions]
    for index, window in enumerate(windows):
        of_question[window.question].append(index)
    answers = []
    for question, indices in zip(questions, of_question, strict=True):
        scored: dict[str, float] = {}
        null = math.inf
        for index in indices:
            start, end = logits[index]
            null = min(null, float(start[0] + end[0]))
            for text, value in _spans(question, windows[index], start, end, num_best, max_answer_length):
                scored[text] = max(value, scored.get(text, -math.inf))
        ranked = sorted(scored.items(), key=lambda entry: -entry[1])[:num_best]
        top = ranked[0][1] if ranked else -math.inf
        weights = [math.exp(value - top) for _, value in ranked]
        best = [
            {"text": text, "score": value, "probability": weight / math.fsum(weights)}
            for (text, value), weight in zip(ranked, weights, strict=True)
        ]
        answers.append(Answer(ranked[0][0] if ranked else "", null - top, best))
    return answers


def _spans(
    question: Question, window: Window, start: torch.Tensor, end: torch.Tensor, num_best: int, max_length: int
) -> list[tuple[str, float]]:
    inside = torch.tensor([first >= 0 for first in window.starts])
    begins = start.masked_fill(~inside, -math.inf).topk(min(num_best, len(inside)))
    stops = end.masked_fill(~inside, -math.inf).topk(min(num_best, len(inside)))
    spans = []
    for value, begin in zip(begins.values.tolist(), begins.indices.tolist(), strict=True):
        for other, stop in zip(stops.values.tolist(), stops.indices.tolist(), strict=True):
            if value + other > -math.inf and begin <= stop < begin + max_length:
                text = question.context[window.starts[begin] : window.ends[stop]].strip()
                if text:
                    spans.append((text, value + other))
    return spans
