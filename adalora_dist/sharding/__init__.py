"""Level 2: which span of each adapter parameter this rank holds, on every training engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from adalora_dist.io.errors import UserError
from adalora_dist.sharding.base import ShardEngine
from adalora_dist.sharding.fsdp2 import Fsdp2Engine
from adalora_dist.sharding.plain import PlainEngine
from adalora_dist.sharding.zero import ZeroEngine, is_zero_optimizer, running_zero_optimizer


def select_engine(params: Sequence[torch.Tensor], optimizer: Any) -> ShardEngine:
    """The engine that has taken over ``params``.

    Args:
        params: trainable parameters, looked up in the model now, in the same order on every rank.
        optimizer: the innermost torch optimizer, inside of a step pre hook of it; anywhere else the outermost
            wrapper (accelerate's, DeepSpeed's) whose chain of ``.optimizer`` leads to it.

    Raises:
        UserError: the optimizer does not hold the parameters, or holds them in a way that no engine supports.
    """
    zero = None
    while hasattr(optimizer, "optimizer"):
        zero = optimizer if is_zero_optimizer(optimizer) else zero
        optimizer = optimizer.optimizer
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    num_missing = sum(id(p) not in optimized for p in params)
    if num_missing:
        zero = zero or running_zero_optimizer(optimizer)
        if zero is not None:
            return ZeroEngine(params, optimizer, zero)
        raise UserError(
            f"{num_missing} of {len(params)} parameters are not in the optimizer, nor is it stepped by ZeRO "
            "stage 1, 2 or 3: pass all trainable parameters; with DeepSpeed bf16/fp16 use a stage from 1 to 3, "
            "with FSDP use version 2"
        )
    sharded = [p for p in params if isinstance(p, DTensor)]
    if not sharded:
        return PlainEngine(params, optimizer)
    if len(sharded) < len(params):
        raise UserError(
            f"{len(sharded)} of {len(params)} parameters are sharded by fully_shard, the others are not: call "
            "fully_shard on the whole model too, and do not ignore what is trained"
        )
    return Fsdp2Engine(sharded, optimizer)
