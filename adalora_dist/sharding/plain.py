"""One process and DDP: every rank holds, and updates, the whole of every parameter.

DDP's gradients are equal on all ranks before the optimizer's step, and so is everything derived from them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from adalora_dist.sharding.base import (
    State,
    local_state,
    nonfinite_flag,
    optimizer_gradients,
    restore_state,
    skip_step_if,
)
from adalora_dist.spans import Span


class PlainEngine:
    """See :class:`adalora_dist.sharding.base.ShardEngine`."""

    shard_group: dist.ProcessGroup | None = None
    num_firings = 1

    def __init__(self, params: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._params = list(params)
        self._optimizer = optimizer

    def spans(self) -> list[Span]:
        return [Span(0, p.numel()) for p in self._params]

    def values(self) -> list[torch.Tensor]:
        return list(self._params)

    def gradients(self) -> list[torch.Tensor | None]:
        for p in self._params:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self._params]

    def nonfinite(self) -> torch.Tensor:
        return nonfinite_flag(optimizer_gradients(self._optimizer))

    def skip_firing_if(self, flag: torch.Tensor) -> None:
        skip_step_if(self._optimizer, flag)

    def write(self, indices: Sequence[int], values: Sequence[torch.Tensor]) -> None:
        torch._foreach_copy_([self._params[k] for k in indices], list(values))

    def shapes(self) -> list[torch.Size]:
        return [p.shape for p in self._params]

    def states(self) -> list[State]:
        return [local_state(self._optimizer.state.get(p, {}), p, _flat) for p in self._params]

    def restore(self, values: Sequence[torch.Tensor], states: Sequence[State]) -> None:
        for p, local, state in zip(self._params, values, states, strict=True):
            _flat(p).copy_(local.reshape(-1))
            restore_state(self._optimizer, p, _flat, state)

    def full(self, index: int) -> torch.Tensor:
        return self._params[index].detach().to(torch.float32, copy=True)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1)
