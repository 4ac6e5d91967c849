"""ROUGE-1, 2, L and Lsum, by Google's ``rouge-score`` with Porter stemming, as published results have it.

F1, 0 to 100, averaged over rows. Lsum compares sentence by sentence; sentences end at line breaks, and after ``.``,
``!`` or ``?`` with a space behind it (the usual splitter needs data that pip cannot install).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.evaluation.batches import Gather, gather_lists

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge_scorer(metrics: Sequence[str] = METRICS) -> Any:
    """The scorer of these metrics.

    Raises:
        UserError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError("ROUGE needs the package rouge-score: pip install 'adalora-dist[eval]'") from error
    return RougeScorer(list(metrics), use_stemmer=True)


def rouge_scores(
    texts: Sequence[str],
    references: Sequence[str],
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = gather_lists,
) -> dict[str, float]:
    """Mean of each metric. Rows are dealt out to the ranks; every rank returns the same."""
    scorer = rouge_scorer()
    local = []
    for index in range(rank, len(texts), world_size):
        scores = scorer.score(_by_sentence(references[index]), _by_sentence(texts[index]))
        local.append(tuple(scores[metric].fmeasure for metric in METRICS))
    rows = gather(local)
    return {name: 100 * math.fsum(row[i] for row in rows) / len(rows) for i, name in enumerate(METRICS)}


def _by_sentence(text: str) -> str:
    return re.sub(r"(?<=[.!?]) +", "\n", text)
