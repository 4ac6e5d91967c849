"""Level 2: which span of each adapter parameter this rank holds, on every training engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from adalora_dist.errors import UserError
from adalora_dist.sharding.base import ShardEngine, Shrink
from adalora_dist.sharding.fsdp2 import Fsdp2Engine
from adalora_dist.sharding.plain import PlainEngine, shrink_plain
from adalora_dist.sharding.zero import ZeroEngine, running_zero_optimizer


def select_engine(params: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer) -> ShardEngine:
    """The engine that has taken over ``params``. Call it inside a step pre hook of ``optimizer``.

    Args:
        params: adapter parameters, looked up in the model now, in the same order on every rank.
        optimizer: the innermost torch optimizer, the one whose ``step`` is about to run.

    Raises:
        UserError: the optimizer does not hold the parameters, or holds them in a way that no engine supports.
    """
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    num_missing = sum(id(p) not in optimized for p in params)
    if num_missing:
        zero = running_zero_optimizer(optimizer)
        if zero is not None:
            return ZeroEngine(params, optimizer, zero)
        raise UserError(
            f"{num_missing} of {len(params)} adapter parameters are not in the optimizer, nor is it stepped by ZeRO "
            "stage 1, 2 or 3: pass all trainable parameters; with DeepSpeed bf16/fp16 use a stage from 1 to 3, "
            "with FSDP use version 2"
        )
    sharded = [p for p in params if isinstance(p, DTensor)]
    if not sharded:
        return PlainEngine(params, optimizer)
    if len(sharded) < len(params):
        raise UserError(
            f"{len(sharded)} of {len(params)} adapter parameters are sharded by fully_shard, the others are not: call "
            "fully_shard on the whole model too, and do not ignore adapters"
        )
    return Fsdp2Engine(sharded, optimizer)


def shrink_parameters(
    engine: ShardEngine, model: nn.Module, optimizer: Any, shrinks: Sequence[Shrink]
) -> Callable[[list[torch.Tensor]], ShardEngine]:
    """Replace adapter parameters by their columns that stay: in the model, the engine's buffers and the optimizer.

    Args:
        engine: that holds them now.
        model: as the engine wraps it.
        optimizer: a torch optimizer, or wrappers around one.
        shrinks: every adapter parameter, in the same order on every rank.

    Returns:
        From the adapter parameters that are left to the engine that holds them.

    Raises:
        UserError: model, engine or optimizer cannot be rebuilt. Nothing has been changed then.
    """
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    shrink_plain(model, inner, shrinks)
    return lambda params: select_engine(params, inner)
