"""One process and DDP: every rank holds, and updates, the whole of every parameter.

DDP's gradients are equal on all ranks before the optimizer's step, and so is everything derived from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adalora_dist.io.errors import UserError
from adalora_dist.sharding.base import (
    Shrink,
    State,
    innermost,
    nonfinite_flag,
    num_missing,
    optimizer_gradients,
    skip_step_if,
)
from adalora_dist.sharding.optimizer_state import local_state, restore_state
from adalora_dist.sharding.spans import Span


class PlainEngine:
    """See :class:`adalora_dist.sharding.base.ShardEngine`."""

    shard_group: dist.ProcessGroup | None = None
    num_firings = 1

    def __init__(self, params: Sequence[torch.Tensor], optimizer: Any) -> None:
        self._params = list(params)
        self._optimizer: torch.optim.Optimizer = innermost(optimizer)

    @classmethod
    def claims(cls, params: Sequence[torch.Tensor], optimizer: Any) -> bool:
        return not num_missing(params, optimizer)

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

    def neighbours(self) -> list[torch.Tensor]:
        return []

    def shrink(self, model: nn.Module, optimizer: Any, shrinks: Sequence[Shrink]) -> None:
        wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        for ddp in wrappers:
            if ddp.mixed_precision is not None or ddp._delay_all_reduce_params:
                raise UserError(
                    "DistributedDataParallel with mixed_precision or delay_all_reduce_named_params cannot be rebuilt "
                    "for smaller adapters: use autocast"
                )
        self._optimizer.zero_grad(set_to_none=True)
        for shrink in shrinks:
            old = shrink.parameter
            shrink.replace(old.shape, self._optimizer, dtype=old.dtype, device=old.device)
        for ddp in wrappers:
            _rebuild_reducer(ddp)

    def retire(self) -> None:
        pass

    def full(self, index: int) -> torch.Tensor:
        return self._params[index].detach().to(torch.float32, copy=True)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1)


def _rebuild_reducer(ddp: Any) -> None:
    """Sort the gradients into buckets anew, as the constructor did. The wrapper stays the same object."""
    from torch._C._distributed_c10d import _register_comm_hook  # a torch without torch.distributed lacks it

    ddp._remove_autograd_hooks()
    ddp._module_parameters = [p for name, p in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore]
    parameters, expect_sparse_gradient = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, expect_sparse_gradient, names, ddp.static_graph)
    ddp._has_rebuilt_buckets = False
    if ddp.static_graph:
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()
    for hook, state in ddp._comm_hooks:
        _register_comm_hook(ddp.reducer, state, hook)
