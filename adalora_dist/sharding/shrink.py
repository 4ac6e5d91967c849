"""Parameters that lose columns for good while an engine trains them; whatever method it is that gives them up.

First the engine makes room: smaller parameters and buffers, all 0. Then values and moments move, one parameter at a
time: put together over the shard group, columns selected, the rank's new span kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adalora_dist.io.errors import UserError
from adalora_dist.sharding import claimant, select_engine
from adalora_dist.sharding.base import Shrink, assemble, innermost
from adalora_dist.sharding.optimizer_state import KNOWN, keeps_an_entry_per_weight
from adalora_dist.sharding.spans import Span
from adalora_dist.sharding.tensors import put_back_shards


@torch.no_grad()
def shrink_parameters(model: nn.Module, optimizer: Any, shrinks: Sequence[Shrink]) -> Any:
    """Reduce parameters to some of their columns: in the model, in the engine, in the optimizer with its moments.

    On every rank, between two optimizer steps. Parameters become new objects: lists of them made before (for clipping,
    say) are stale, and so is every :class:`ShardEngine`. Model, torch optimizer, and the engine's and accelerate's
    wrappers around them stay the same objects, but for DeepSpeed's ZeRO optimizer, which is then a new
    ``engine.optimizer``. Gradients are dropped. Collective.

    Args:
        model: as the engine wraps it (DDP, ``fully_shard``, DeepSpeed engine), or the plain model on one process.
        optimizer: the torch optimizer, one with an entry per weight, or any wrapper of it; None, or the one that it
            has now, where the model has it, as a DeepSpeed engine does.
        shrinks: each of another parameter, in the same order on every rank; of at least one something stays.

    Returns:
        What leads to the torch optimizer, for :func:`adalora_dist.sharding.select_engine`.

    Raises:
        UserError: engine or optimizer cannot be rebuilt. Nothing has been changed then.
    """
    put_back_shards(model)
    parameters: list[torch.Tensor] = [shrink.parameter for shrink in shrinks]
    if optimizer is getattr(model, "optimizer", None):
        optimizer = None  # the engine is about to get another
    outermost = optimizer
    if claimant(parameters, optimizer) is None and claimant(parameters, model) is not None:
        outermost = model
    if not keeps_an_entry_per_weight(innermost(outermost)):
        raise UserError(
            f"it is not known how to reduce the state of {type(innermost(outermost)).__name__}: use {KNOWN}"
        )
    others = select_engine(parameters, outermost).neighbours()
    old = select_engine([*parameters, *others], outermost)
    spans, shapes, values, states = old.spans(), old.shapes(), old.values(), old.states()
    old.shrink(model, optimizer, shrinks)

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
        in_order = sorted(states[k].items())  # alike on all ranks, as each is put together
        new_states.append({n: state if n == "step" else move(state, k, span) for n, state in in_order})
    new.restore(new_values, new_states)
    return outermost
