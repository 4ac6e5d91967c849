"""Sizes of public data sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Any

from adalora_dist.tasks.rows.held_out import DEFAULT_SHARE

PUBLIC_ROWS = {
    "cola": 8551, "sst2": 67349, "mrpc": 3668, "stsb": 5749, "qqp": 363846, "mnli": 392702, "qnli": 104743, "rte": 2490,
    "v1.1": 87599, "v2.0": 130319,  # SQuAD: questions
    "xsum": 204045, "cnn_dailymail": 287113, "e2e": 42061,
    "boolq": 9427, "piqa": 16113, "siqa": 33410, "hellaswag": 39905, "winogrande": 40398, "arc_easy": 2251,
    "arc_challenge": 1119, "openbookqa": 4957,
}  # fmt: skip
"""Training rows of the public data sets, by task."""


def count_rows(data: Any, tasks: Sequence[str], load: Callable[[], Sized], validates: bool = False) -> int:
    """Training rows: of public data sets from the table above, of all others by loading them.

    Args:
        validates: a share of them may be held out, for evaluations while training (equal rows of a public set aside).
    """
    if data.source != "hub":
        return len(load())
    counts = [min(PUBLIC_ROWS[task], data.max_train_rows or PUBLIC_ROWS[task]) for task in tasks]
    if validates and not data.eval_split:
        share = DEFAULT_SHARE if data.eval_share is None else data.eval_share
        counts = [count - min(round(share * count) or 1, data.max_eval_rows or count) for count in counts]
    return sum(counts)
