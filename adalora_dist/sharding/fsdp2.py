"""FSDP2 (``torch.distributed.fsdp.fully_shard``): parameters and gradients are DTensors, sharded by rows.

``Shard(0)`` cuts dim 0 as ``torch.chunk`` does: blocks of ceil(rows / world) rows, the last ones shorter or empty.
A block of rows of a row-major tensor is a contiguous span. HSDP adds an outer ``Replicate`` mesh axis; its replicas
hold equal gradients by the time of the step, so the shard axis alone completes every sum.

Between backward and the next forward the optimizer's DTensors are the only copy: one write is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from adalora_dist.io.errors import UserError
from adalora_dist.sharding.base import (
    Shrink,
    State,
    assemble,
    innermost,
    nonfinite_flag,
    num_missing,
    optimizer_gradients,
    replace_in_optimizer,
    skip_step_if,
)
from adalora_dist.sharding.optimizer_state import local_state, restore_state
from adalora_dist.sharding.spans import Span


class Fsdp2Engine:
    """See :class:`adalora_dist.sharding.base.ShardEngine`.

    Raises:
        UserError: parameters that are not sharded, a placement other than ``Shard(0)`` on one mesh axis and
            ``Replicate`` on the others, or parameters on different meshes.
    """

    num_firings = 1

    def __init__(self, params: Sequence[torch.Tensor], optimizer: Any) -> None:
        self._params = [p for p in params if isinstance(p, DTensor)]
        if len(self._params) < len(params):
            raise UserError(
                f"{len(self._params)} of {len(params)} parameters are sharded by fully_shard, the others are not: call "
                "fully_shard on the whole model too, and do not ignore what is trained"
            )
        self._optimizer: torch.optim.Optimizer = innermost(optimizer)
        mesh, axis = self._params[0].device_mesh, _shard_axis(self._params[0])
        for p in self._params:
            if p.device_mesh != mesh or _shard_axis(p) != axis:
                raise UserError(
                    f"adapter parameters are sharded over different device meshes ({p.device_mesh} and {mesh}): call "
                    "fully_shard with one mesh for all modules that hold adapters"
                )
        self.shard_group: dist.ProcessGroup | None = mesh.get_group(axis)
        self._spans = [_row_block(p, mesh.get_local_rank(axis), mesh.size(axis)) for p in self._params]

    @classmethod
    def claims(cls, params: Sequence[torch.Tensor], optimizer: Any) -> bool:
        return any(isinstance(p, DTensor) for p in params) and not num_missing(params, optimizer)

    def spans(self) -> list[Span]:
        return list(self._spans)

    def values(self) -> list[torch.Tensor]:
        return [_local(p) for p in self._params]

    def gradients(self) -> list[torch.Tensor | None]:
        views: list[torch.Tensor | None] = []
        for p in self._params:
            if p.grad is None:
                p.grad = torch.zeros_like(p, requires_grad=False)
            views.append(_local(p.grad))
        return views

    def nonfinite(self) -> torch.Tensor:
        gradients = optimizer_gradients(self._optimizer)
        return nonfinite_flag(_local(g) if isinstance(g, DTensor) else g for g in gradients)

    def skip_firing_if(self, flag: torch.Tensor) -> None:
        skip_step_if(self._optimizer, flag)

    def write(self, indices: Sequence[int], values: Sequence[torch.Tensor]) -> None:
        torch._foreach_copy_([_local(self._params[k]) for k in indices], list(values))

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
        """No collective.

        Every sharded parameter has an object of its own (``FSDPParam``) in its module's group, so only those of
        adapters are made anew, in the way the group's constructor makes them; the frozen backbone is not touched. What
        a group has worked out of its parameters (data types; from torch 2.15 on also the order in which gradients
        travel) it works out again, as before its first forward.
        """
        self._optimizer.zero_grad(set_to_none=True)
        places: dict[tuple[nn.Module, str], tuple[Any, Any]] = {}
        states = []
        for module in model.modules():
            if isinstance(module, FSDPModule):
                states.append(module._get_fsdp_state())
                for group in states[-1]._fsdp_param_groups:
                    for held in group.fsdp_params:
                        places[held._module_info.module, held._module_info.param_name] = group, held
        changed: dict[int, Any] = {}
        for shrink in shrinks:
            group, held = places[shrink.module, shrink.name]
            changed[id(group)] = group
            sharded = held.sharded_param
            held._post_load_hook_handle.remove()
            index = group.fsdp_params.index(held)
            new = shrink.replace(sharded.shape, self._optimizer, dtype=sharded.dtype, device=group.device)
            if new is None:
                del group.fsdp_params[index]
                continue
            made = type(held)(
                new, held._module_info, held.mesh_info, held.post_forward_mesh_info, group.device, None,
                held.mp_policy, group.offload_policy,
            )  # fmt: skip
            made._param_fqn = held._param_fqn
            group.fsdp_params[index] = made
            replace_in_optimizer(self._optimizer, new, made.sharded_param)
        for group in changed.values():
            if group.fsdp_params:
                group.lazy_init()
        for state in states:  # a group without parameters would gather nothing
            state._fsdp_param_groups[:] = [group for group in state._fsdp_param_groups if group.fsdp_params]

    def retire(self) -> None:
        pass

    def full(self, index: int) -> torch.Tensor:
        p = self._params[index]
        return assemble(_flat(p), self._spans[index], p.shape, self.shard_group)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows. (``to_local`` would make a new view of every parameter, at every step.)"""
    assert isinstance(tensor, DTensor)
    return tensor._local_tensor


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return _local(tensor).view(-1)


def _shard_axis(p: DTensor) -> int:
    """The one mesh axis over which the rows are cut."""
    axes = [axis for axis, placement in enumerate(p.placements) if placement == Shard(0)]
    others = [placement for placement in p.placements if placement != Shard(0)]
    if len(axes) != 1 or any(placement != Replicate() for placement in others):
        raise UserError(
            f"an adapter parameter of shape {tuple(p.shape)} has placements {p.placements}; supported are Shard(0) on "
            "one mesh axis and Replicate() on the others: leave adapters out of tensor parallelism and of "
            "shard_placement_fn"
        )
    return axes[0]


def _row_block(p: DTensor, rank: int, world_size: int) -> Span:
    """Elements of this rank's rows of ``p``."""
    rows, row_numel = p.shape[0], p.shape[1:].numel()
    block = -(-rows // world_size)
    start, stop = min(rank * block, rows), min((rank + 1) * block, rows)
    span = Span(start * row_numel, stop * row_numel)
    if _local(p).numel() != span.stop - span.start:
        raise UserError(
            f"rank {rank} of {world_size} holds {_local(p).numel()} elements of an adapter parameter of shape "
            f"{tuple(p.shape)}, not rows {start} to {stop}: fully_shard must be the only thing that shards it"
        )
    return span
