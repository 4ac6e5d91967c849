"""Physical removal of pruned triplets, once the pattern is frozen.

From then on a pruned triplet takes part in nothing (``allocator.py``), so P, lambda and Q can lose it, and with them
gradients, Adam moments and the engine's flat buffers (``sharding/shrink.py``): the trajectory is that of the masked
run, up to the rounding of sums in another order. A matrix of rank 0 loses its branch. The scale alpha / init_rank
stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.layers import TripletLayer
from adalora_dist.sharding.base import Shrink
from adalora_dist.sharding.packed import select_columns
from adalora_dist.sharding.shrink import shrink_parameters
from adalora_dist.sharding.spans import FACTORS_OF_MATRIX


@torch.no_grad()
def remove_triplets(layers: Sequence[TripletLayer], keep: torch.Tensor, model: nn.Module, optimizer: Any) -> Any:
    """Remove the triplets outside of ``keep`` from a running model, its engine and its optimizer. Collective.

    Parameters become new objects: lists of them made before (for clipping, say) are stale. Model, torch optimizer, and
    the engine's and accelerate's wrappers around them stay the same objects, but for DeepSpeed's ZeRO optimizer, which
    is then a new ``engine.optimizer``. Gradients are dropped.

    Args:
        layers: all adapted layers, in canonical order, with all of their triplets.
        keep: (num_triplets,) bool, on any device.
        model: as the engine wraps it (DDP, ``fully_shard``, DeepSpeed engine), or the plain model on one process.
        optimizer: the torch optimizer, one with an entry per weight, or any wrapper of it.

    Returns:
        The outermost optimizer, for the engine to be looked up again.

    Raises:
        UserError: engine or optimizer cannot be rebuilt. Nothing has been changed then.
    """
    lambdas = layers[0].lambdas
    kept = [part.nonzero().flatten() for part in keep.split([layer.init_rank for layer in layers])]
    shrinks = [
        Shrink(layer, kind, triplets)
        for layer, triplets in zip(layers, kept, strict=True)
        for kind in FACTORS_OF_MATRIX
        if layer.rank
    ]
    shrinks.append(Shrink(lambdas, "lam", keep.nonzero().flatten()))
    try:
        outermost = shrink_parameters(model, optimizer, shrinks)
    except UserError as error:
        raise UserError(f"compact true: {error}, or set compact to false") from error
    for layer, triplets in zip(layers, kept, strict=True):
        _remember(layer, triplets.tolist())
    lambdas.index()
    return outermost


@torch.no_grad()
def shrink_layers(layers: Sequence[TripletLayer], kept: Sequence[Sequence[int]]) -> None:
    """Reduce layers that no engine and no optimizer has taken over yet to some of their triplets.

    Args:
        layers: all adapted layers, in canonical order.
        kept: per matrix the original indices of the triplets that stay, ascending; none: the branch goes.

    Raises:
        ValueError: a triplet that the layer does not hold.
    """
    in_vector: list[int] = []
    shrinks: list[Shrink] = []
    for layer, indices in zip(layers, kept, strict=True):
        if not set(indices) <= set(layer.triplets):
            raise ValueError(f"{layer.name} holds the triplets {layer.triplets}, not all of {tuple(indices)}")
        columns = [layer.triplets.index(i) for i in indices]
        in_vector += [layer.first + column for column in columns]
        for kind in FACTORS_OF_MATRIX if layer.rank else ():
            shrinks.append(Shrink(layer, kind, torch.tensor(columns, dtype=torch.long)))
        _remember(layer, indices)
    lambdas = layers[0].lambdas
    select_columns([*shrinks, Shrink(lambdas, "lam", torch.tensor(in_vector, dtype=torch.long))])
    lambdas.index()


def _remember(layer: TripletLayer, triplets: Sequence[int]) -> None:
    layer.rank, layer.triplets = len(triplets), tuple(triplets)
