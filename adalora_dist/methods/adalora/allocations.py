"""What a selection of triplets was, and how allocations.jsonl says it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

RECENT = 16
"""Selections whose scores are kept, 8 bytes per triplet each, until a log line has read them."""


@dataclass(frozen=True)
class Allocation:
    """One selection of triplets; tensors stay on the device until somebody reads them."""

    step: int
    budget: int
    keep: torch.Tensor
    """(num_triplets,) bool in canonical order."""
    lowest_kept_score: torch.Tensor | None = None
    """What a triplet needed to stay, float64; infinite where none stayed."""
    scores: torch.Tensor | None = None
    """(num_triplets,) float64, what was selected by; None where it is long ago, or came with a checkpoint."""


def with_next(made: Sequence[Allocation], latest: Allocation) -> list[Allocation]:
    """``made`` and one more; the scores of the one that is :data:`RECENT` selections back are given up."""
    kept = list(made)
    if len(kept) >= RECENT:
        kept[-RECENT] = replace(kept[-RECENT], scores=None)
    return [*kept, latest]


def spread(made: Allocation, ranks: Sequence[int]) -> dict[str, float]:
    """``importance_spread``: standard deviation over mean of the matrices' mean scores; {} where scores are not known.

    0: all matrices matter alike, and adapting ranks has nothing to gain. Reads from the device.
    """
    if made.scores is None:
        return {}
    means = torch.stack([part.mean() for part in made.scores.cpu().split(list(ranks))])
    ratio = (means.std(correction=0) / means.mean().clamp_min(1e-300)).item()
    return {"importance_spread": ratio} if math.isfinite(ratio) else {}


def records(allocations: Sequence[Allocation], ranks: Sequence[int], first: int) -> list[dict[str, Any]]:
    """For every allocation from number ``first`` on a line of allocations.jsonl. Reads from the device.

    step, budget; lowest_kept_score (null: none stayed); pruned, returned: triplets that left and that came back since
    the allocation before; ranks: active rank of each matrix, in the order of rank_pattern.json; importance: mean score
    of each matrix's triplets in that order, four digits (null: not known).

    Args:
        ranks: triplets of each matrix at the start of the run.
    """
    made = []
    for index in range(first, len(allocations)):
        allocation, keep = allocations[index], allocations[index].keep.cpu()
        before = allocations[index - 1].keep.cpu() if index else torch.ones_like(keep)
        lowest = math.inf if allocation.lowest_kept_score is None else allocation.lowest_kept_score.item()
        scores = [] if allocation.scores is None else allocation.scores.cpu().split(list(ranks))
        made.append(
            {
                "step": allocation.step,
                "budget": allocation.budget,
                "lowest_kept_score": lowest if math.isfinite(lowest) else None,
                "pruned": int((before & ~keep).sum()),
                "returned": int((keep & ~before).sum()),
                "ranks": [int(part.sum()) for part in keep.split(list(ranks))],
                "importance": [float(f"{part.mean().item():.4g}") for part in scores] or None,
            }
        )
    return made
