"""Which span of each adapter parameter this rank holds, on every training engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adalora_dist.io.errors import UserError
from adalora_dist.sharding.base import ShardEngine, num_missing
from adalora_dist.sharding.fsdp2 import Fsdp2Engine
from adalora_dist.sharding.packed import PackedEngine
from adalora_dist.sharding.packing import holders
from adalora_dist.sharding.plain import PlainEngine
from adalora_dist.sharding.zero import ZeroEngine

ENGINES: tuple[type[ShardEngine], ...] = (ZeroEngine, Fsdp2Engine, PlainEngine)
"""Asked in this order whether parameters are theirs; the last one takes whatever its optimizer updates."""


def claimant(params: Sequence[torch.Tensor], optimizer: Any) -> type[ShardEngine] | None:
    """The kind of engine that has taken over ``params``; None if there is none. Arguments as :func:`select_engine`."""
    held = holders(params)
    return next((engine for engine in ENGINES if engine.claims(held, optimizer)), None)


def select_engine(params: Sequence[torch.Tensor], optimizer: Any) -> ShardEngine:
    """The engine that has taken over ``params``.

    Args:
        params: trainable parameters, looked up in the model now, in the same order on every rank.
        optimizer: the innermost torch optimizer, inside of a step pre hook of it; anywhere else the outermost
            wrapper (accelerate's, DeepSpeed's) whose chain of ``.optimizer`` leads to it.

    Raises:
        UserError: the optimizer does not hold the parameters, or holds them in a way that no engine supports.
    """
    engine, held = claimant(params, optimizer), holders(params)
    if engine is None:
        raise UserError(
            f"{num_missing(held, optimizer)} of {len(held)} parameters are not in the optimizer, nor is it stepped "
            "by ZeRO stage 1, 2 or 3: make it of all trainable parameters, after adapt; with DeepSpeed bf16/fp16 use a "
            "stage from 1 to 3, with FSDP use version 2"
        )
    inner = engine(held, optimizer)
    return PackedEngine(params, inner) if PackedEngine.claims(params, optimizer) else inner
