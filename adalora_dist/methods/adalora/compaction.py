"""Physical removal of pruned triplets, once the pattern is frozen.

From then on a pruned triplet takes part in nothing (``allocator.py``), so P, lambda and Q can lose it, and with them
gradients, Adam moments and the engine's flat buffers: the trajectory is that of the masked run, up to the rounding of
sums in another order. A matrix of rank 0 loses its branch. The scale alpha / init_rank stays.

In a run, the engine first makes room: smaller parameters and buffers, all 0 (``shrink_*`` in ``sharding``). Then
values and moments move, one parameter at a time: put together over the shard group, columns selected, the rank's new
span kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.allocator import RankAllocator
from adalora_dist.methods.adalora.layers import SVDLinear
from adalora_dist.methods.inject import AdaptedMatrix
from adalora_dist.sharding import select_engine
from adalora_dist.sharding.base import Shrink, assemble
from adalora_dist.sharding.fsdp2 import Fsdp2Engine, shrink_fsdp2
from adalora_dist.sharding.plain import shrink_plain
from adalora_dist.sharding.spans import FACTORS_OF_MATRIX, Span
from adalora_dist.sharding.tensors import put_back_shards
from adalora_dist.sharding.zero import is_zero_optimizer
from adalora_dist.sharding.zero_shrink import shrink_zero


@torch.no_grad()
def compact(allocator: RankAllocator, model: nn.Module, optimizer: Any) -> bool:
    """Remove the triplets that were pruned for good; once per run, on every rank, between two optimizer steps.

    Parameters become new objects: lists of them made before (for clipping, say) are stale. Model, torch optimizer, and
    the engine's and accelerate's wrappers around them stay the same objects, but for DeepSpeed's ZeRO optimizer, which
    is then a new ``engine.optimizer``. Gradients are dropped. Collective.

    Args:
        allocator: of this run.
        model: as the engine wraps it (DDP, ``fully_shard``, DeepSpeed engine), or the plain model on one process.
        optimizer: the torch optimizer (torch's AdamW or Adam), or any wrapper of it.

    Returns:
        Whether anything was done. False: the pattern is not frozen yet, was compacted before, or keeps no triplet at
        all (nothing would be left that an engine could shard).

    Raises:
        UserError: engine or optimizer cannot be rebuilt. Nothing has been changed then.
        RuntimeError: ranks disagree on the pattern.
    """
    if not allocator.frozen or allocator.compacted:
        return False
    allocator.compare_patterns()
    assert allocator.keep is not None
    kept = [part.nonzero().flatten() for part in allocator.keep.split(allocator.ranks)]
    if not any(len(triplets) for triplets in kept):
        return False
    shrinks = [
        Shrink(matrix.layer, kind, triplets)
        for matrix, triplets in zip(allocator.matrices, kept, strict=True)
        for kind in FACTORS_OF_MATRIX
        if matrix.layer.rank
    ]
    shrinks.append(Shrink(allocator.lambdas, "lam", allocator.keep.nonzero().flatten()))
    outermost = _shrink(model, optimizer, shrinks)
    for matrix, triplets in zip(allocator.matrices, kept, strict=True):
        _remember(matrix.layer, triplets.tolist())
    allocator.lambdas.index()
    allocator.rebind(outermost)
    return True


def _shrink(model: nn.Module, optimizer: Any, shrinks: Sequence[Shrink]) -> Any:
    """Reduce parameters in the model, in the engine's buffers, in the optimizer; returns the outermost optimizer."""
    put_back_shards(model)
    adapters = [shrink.parameter for shrink in shrinks]
    outermost, others = optimizer, []
    zero = getattr(model, "optimizer", None)
    if is_zero_optimizer(zero):  # its buffers hold all that is trained
        chosen = {id(p) for p in adapters}
        outermost, others = model, [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    innermost = outermost
    while hasattr(innermost, "optimizer"):
        innermost = innermost.optimizer
    if not isinstance(innermost, torch.optim.Adam | torch.optim.AdamW):
        raise UserError(
            f"compact true with {type(innermost).__name__}: it is not known how to reduce its state; use "
            "torch.optim.AdamW or torch.optim.Adam, or set compact to false"
        )
    old = select_engine([*adapters, *others], outermost)
    spans, shapes, values, states = old.spans(), old.shapes(), old.values(), old.states()
    if is_zero_optimizer(zero):
        shrink_zero(model, shrinks)
        while hasattr(optimizer, "optimizer"):
            if optimizer.optimizer is zero:
                optimizer.optimizer = model.optimizer
            optimizer = optimizer.optimizer
    elif isinstance(old, Fsdp2Engine):
        shrink_fsdp2(model, innermost, shrinks)
    else:
        shrink_plain(model, innermost, shrinks)

    columns: list[torch.Tensor | None] = [*(shrink.columns for shrink in shrinks), *[None] * len(others)]
    left = [k for k, kept in enumerate(columns) if kept is None or len(kept)]
    new = select_engine([*(shrink.parameter for shrink in shrinks if len(shrink.columns)), *others], outermost)

    def move(local: torch.Tensor, k: int, span: Span) -> torch.Tensor:
        """``span`` of the reduced parameter k, from the local span of the whole one."""
        whole, kept = assemble(local.reshape(-1), spans[k], shapes[k], old.shard_group), columns[k]
        return (whole if kept is None else whole.index_select(-1, kept)).flatten()[span.start : span.stop].clone()

    new_values, new_states = [], []
    for k, span in zip(left, new.spans(), strict=True):
        new_values.append(move(values[k], k, span))
        new_states.append({n: state if n == "step" else move(state, k, span) for n, state in states[k].items()})
    new.restore(new_values, new_states)
    return outermost


@torch.no_grad()
def shrink_layers(matrices: Sequence[AdaptedMatrix], kept: Sequence[Sequence[int]]) -> None:
    """Reduce layers that no engine and no optimizer has taken over yet to some of their triplets.

    Args:
        matrices: as ``inject_adapters`` returned them.
        kept: per matrix the original indices of the triplets that stay, ascending; none: the branch goes.

    Raises:
        ValueError: a triplet that the layer does not hold.
    """
    in_vector = []
    for matrix, indices in zip(matrices, kept, strict=True):
        layer = matrix.layer
        if not set(indices) <= set(layer.triplets):
            raise ValueError(f"{matrix.name} holds the triplets {layer.triplets}, not all of {tuple(indices)}")
        columns = [layer.triplets.index(i) for i in indices]
        in_vector += [layer.first + column for column in columns]
        for kind in FACTORS_OF_MATRIX if layer.rank else ():
            _select(layer, kind, columns)
        _remember(layer, indices)
    lambdas = matrices[0].layer.lambdas
    _select(lambdas, "lam", in_vector)
    lambdas.index()


def _select(module: nn.Module, name: str, columns: Sequence[int]) -> None:
    """Reduce a parameter to some of its columns, its last dimension; without any it goes."""
    old = getattr(module, name)
    if columns:
        chosen = old.index_select(-1, torch.tensor(columns, dtype=torch.long, device=old.device))
        setattr(module, name, nn.Parameter(chosen, requires_grad=old.requires_grad))
    else:
        delattr(module, name)


def _remember(layer: SVDLinear, triplets: Sequence[int]) -> None:
    layer.rank, layer.triplets = len(triplets), tuple(triplets)
