"""What an engine answers about adapter parameters. This is the whole surface.

A rank holds of every parameter one contiguous span of the flattened (row-major) full tensor: all of it (one
process, DDP), a block of rows (FSDP2), a flat slice (ZeRO), or nothing. Everything else in the method sees
spans and flat values only; see ``docs/sharding.md`` for the drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

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
        """Set the local span of parameter ``index`` so that the next forward sees it and the next step keeps it."""
        ...

    def full(self, index: int) -> torch.Tensor:
        """The whole parameter, float32, in its full shape, on every rank. Collective; for reports and export."""
        ...


def gradient_count_nonfinite(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """float32 scalar: how many of the tensors hold a nan or an inf. No host synchronisation."""
    present = [g for g in gradients if g.numel()]
    if not present:
        return torch.zeros((), dtype=torch.float32)
    norms = torch.stack([n.float() for n in torch._foreach_norm(present, float("inf"))])
    return (~torch.isfinite(norms)).sum().float()


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
