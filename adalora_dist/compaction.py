"""Physical removal of pruned triplets, once the pattern is frozen.

From then on a pruned triplet takes part in nothing (``allocator.py``), so P, lambda and Q can lose it, and with them
gradients, Adam moments and the engine's flat buffers: the trajectory is that of the masked run, up to the rounding of
sums in another order. A matrix of rank 0 loses its branch. The scale alpha / init_rank stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adalora_dist.allocator import RankAllocator
from adalora_dist.inject import AdaptedMatrix
from adalora_dist.layers import SVDLinear
from adalora_dist.sharding import shrink_parameters
from adalora_dist.sharding.base import Shrink
from adalora_dist.spans import FACTOR_KINDS


def compact(allocator: RankAllocator, model: nn.Module, optimizer: Any) -> bool:
    """Remove the triplets that were pruned for good; once per run, on every rank, between two optimizer steps.

    Parameters become new objects: lists of them made before (for clipping, say) are stale. Model, optimizer, and the
    engine's and accelerate's wrappers around them stay the same objects. Gradients are dropped.

    Args:
        allocator: of this run.
        model: as the engine wraps it (DDP, ``fully_shard``, DeepSpeed engine), or the plain model on one process.
        optimizer: as the loop knows it: the torch optimizer, or wrappers with one as ``.optimizer``.

    Returns:
        Whether anything was done. False: the pattern is not frozen yet, was compacted before, or keeps no triplet at
        all (nothing would be left that the engine could shard).

    Raises:
        UserError: the engine is set up in a way that cannot be rebuilt. Nothing has been changed then.
        RuntimeError: ranks disagree on the pattern.
    """
    if not allocator.frozen or allocator.compacted:
        return False
    allocator.compare_patterns()
    assert allocator.keep is not None
    kept = [part.nonzero().flatten() for part in allocator.keep.split(allocator.ranks)]
    if not any(len(indices) for indices in kept):
        return False
    shrinks = [
        Shrink(matrix.layer, kind, indices)
        for matrix, indices in zip(allocator.matrices, kept, strict=True)
        for kind in FACTOR_KINDS
        if matrix.layer.rank
    ]
    make_engine = shrink_parameters(allocator.engine, model, optimizer, shrinks)
    for matrix, indices in zip(allocator.matrices, kept, strict=True):
        _remember(matrix.layer, indices.tolist())
    allocator.rebind(make_engine)
    return True


@torch.no_grad()
def shrink_layers(matrices: Sequence[AdaptedMatrix], kept: Sequence[Sequence[int]]) -> None:
    """Reduce layers that no engine and no optimizer has taken over yet to some of their triplets.

    Args:
        matrices: as ``inject_adapters`` returned them.
        kept: per matrix the original indices of the triplets that stay, ascending; none: the branch goes.

    Raises:
        ValueError: a triplet that the layer does not hold.
    """
    for matrix, indices in zip(matrices, kept, strict=True):
        layer = matrix.layer
        if not set(indices) <= set(layer.triplets):
            raise ValueError(f"{matrix.name} holds the triplets {layer.triplets}, not all of {tuple(indices)}")
        for kind in FACTOR_KINDS if layer.rank else ():
            old = getattr(layer, kind)
            columns = torch.tensor([layer.triplets.index(i) for i in indices], dtype=torch.long, device=old.device)
            if len(columns):
                setattr(layer, kind, nn.Parameter(old.index_select(-1, columns), requires_grad=old.requires_grad))
            else:
                delattr(layer, kind)
        _remember(layer, indices)


def _remember(layer: SVDLinear, triplets: Sequence[int]) -> None:
    layer.rank, layer.triplets = len(triplets), tuple(triplets)
