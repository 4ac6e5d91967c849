"""What an engine answers about adapter parameters. This is the whole surface.

A rank holds of every parameter one contiguous span of the flattened (row-major) full tensor: all of it (one
process, DDP), a block of rows (FSDP2), a flat slice (ZeRO), or nothing. Everything else in the method sees
spans and flat values only; see ``docs/sharding.md`` for the drawing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import get_total_norm

from adalora_dist.spans import Span as Span


class ShardEngine(Protocol):
    """One training engine, seen from the innermost optimizer's step hooks.

    Constructed after the engine has taken the parameters over (at the first step), from the adapter parameters
    in a fixed order that is the same on every rank, and from the innermost torch optimizer.
    """

    shard_group: dist.ProcessGroup | None
    """Ranks that together hold one copy of every parameter; None where each rank holds all of it."""
    num_firings: int
    """How often the optimizer's step fires per training step (ZeRO: once per parameter group or sub-group)."""

    def spans(self) -> list[Span]:
        """The span of each parameter that this rank's optimizer updates. Constant during a run."""
        ...

    def values(self) -> list[torch.Tensor]:
        """Per parameter the local span, 1-D, as the optimizer updates it (the fp32 master where there is one)."""
        ...

    def gradients(self) -> list[torch.Tensor | None]:
        """Per parameter a writable 1-D view of the gradient that the step about to run will consume.

        A parameter that received no gradient gets zeros. None: not part of this firing.
        """
        ...

    def nonfinite(self) -> torch.Tensor:
        """float32 scalar > 0 if any gradient of this training step that this rank holds is nan or inf.

        Asked at the first firing; covers every parameter of the optimizer, not the adapters alone.
        """
        ...

    def skip_firing(self) -> None:
        """Make the firing about to run change neither weights nor optimizer state."""
        ...

    def write(self, index: int, values: torch.Tensor) -> None:
        """Set the local span of parameter ``index`` so that the next forward sees it and the next step keeps it.

        Only inside the post hook of a training step's last firing: the engine then sends new values to the ranks
        that read them. No collective.
        """
        ...

    def full(self, index: int) -> torch.Tensor:
        """The whole parameter, float32, in its full shape, on every rank. Collective; for reports and export."""
        ...


class Shrink(NamedTuple):
    """A parameter that keeps some of its columns (the last dimension); with none left it goes."""

    module: nn.Module
    name: str
    columns: torch.Tensor
    """(number kept,) long, ascending, on the parameter's device."""

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.name)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The columns of ``tensor`` that stay, a copy."""
        return tensor.index_select(-1, self.columns)


def replace_parameter(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter | None,
    shrink: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """``optimizer`` goes on with ``new`` in place of ``old`` (None: with neither), and with its moments.

    Args:
        shrink: from a tensor of the old parameter's shape to one of the new.
    """
    state = optimizer.state.pop(old, {})
    for group in optimizer.param_groups:
        for index, p in enumerate(group["params"]):
            if p is old:
                group["params"][index : index + 1] = [] if new is None else [new]
                break
    if new is not None and state:
        optimizer.state[new] = {
            key: shrink(value) if torch.is_tensor(value) and value.shape == old.shape else value
            for key, value in state.items()
        }


def nonfinite_flag(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """float32 scalar: 1 if any of the (local) tensors holds a nan or an inf, else 0. No host synchronisation."""
    present = [g for g in gradients if g.numel()]
    return (~torch.isfinite(get_total_norm(present, math.inf))).float()


def optimizer_gradients(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every gradient that the optimizer's next step will consume, adapters or not."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """torch optimizers pass over a parameter whose gradient is None: weight, moments and step count stay."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


def assemble(local: torch.Tensor, span: Span, shape: torch.Size, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The full float32 tensor of which this rank holds ``span``: every rank's span, summed over ``group``."""
    full = torch.zeros(shape.numel(), dtype=torch.float32, device=local.device)
    full[span.start : span.stop] = local
    return sum_over(group, full).view(shape)


def sum_over(group: dist.ProcessGroup | None, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` summed over ``group``, in place where possible; unchanged for None.

    A CPU tensor in a group that only moves CUDA tensors (parameters offloaded to the CPU) takes the way over the GPU.
    """
    if group is None or dist.get_world_size(group) == 1:
        return tensor
    if tensor.device.type == "cpu" and dist.get_backend(group) == "nccl":
        on_device = tensor.cuda()
        dist.all_reduce(on_device, group=group)
        return on_device.to(tensor.device)
    dist.all_reduce(tensor, group=group)
    return tensor
