"""Accuracy on one task by one way of evaluation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from adalora_dist.tasks.commonsense.rows import Example


@dataclass(frozen=True)
class TaskResult:
    """Score of one task by one method.

    ``majority`` is the accuracy of always giving the most frequent answer. ``num_parse_failures`` counts generated
    texts without an answer (they are wrong answers, too); scoring by likelihood has none.
    """

    task: str
    method: Literal["likelihood", "generation"]
    num_rows: int
    num_correct: int
    majority: float
    num_parse_failures: int = 0

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.num_correct / self.num_rows


def as_scores(results: Sequence[TaskResult]) -> dict[str, float]:
    """``accuracy``, the mean of all results, and where there are several each of them as ``TASK METHOD``."""
    scores = {"accuracy": math.fsum(result.accuracy for result in results) / len(results)} if results else {}
    if len(results) > 1:
        scores |= {f"{result.task} {result.method}": result.accuracy for result in results}
    return scores


def task_result(
    examples: Sequence[Example],
    method: Literal["likelihood", "generation"],
    answers: Sequence[str | None],
) -> TaskResult:
    """Compare the answers (None: no answer found) with those of the examples, which are all of one task."""
    [(_, most_frequent)] = Counter(example.answer for example in examples).most_common(1)
    return TaskResult(
        task=examples[0].task,
        method=method,
        num_rows=len(examples),
        num_correct=sum(answer == example.answer for answer, example in zip(answers, examples, strict=True)),
        majority=most_frequent / len(examples),
        num_parse_failures=sum(answer is None for answer in answers),
    )
