"""What a selection of triplets was, and how allocations.jsonl says it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Allocation:
    """One selection of triplets; tensors stay on the device until somebody reads them."""

    step: int
    budget: int
    keep: torch.Tensor
    """(num_triplets,) bool in canonical order."""
    lowest_kept_score: torch.Tensor | None = None
    """What a triplet needed to stay, float64; infinite where none stayed."""
    importance: torch.Tensor | None = None
    """(num_matrices,) float64, the mean score of each matrix's triplets; None: the selection came with a checkpoint."""


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
        scores = None if allocation.importance is None else allocation.importance.tolist()
        made.append(
            {
                "step": allocation.step,
                "budget": allocation.budget,
                "lowest_kept_score": lowest if math.isfinite(lowest) else None,
                "pruned": int((before & ~keep).sum()),
                "returned": int((keep & ~before).sum()),
                "ranks": [int(part.sum()) for part in keep.split(list(ranks))],
                "importance": scores and [float(f"{score:.4g}") for score in scores],
            }
        )
    return made
