"""Do ranks agree? On patterns while a run goes on, on patterns and lambdas at its end."""

from __future__ import annotations

import torch
import torch.distributed as dist

from adalora_dist.methods.adalora.bound import BoundTriplets
from adalora_dist.methods.adalora.digest import DelayedSums
from adalora_dist.sharding.agreement import world_size
from adalora_dist.sharding.base import sum_over

_LAMBDA_TOLERANCE = 1e-3
"""Relative to the largest lambda; replicas on equal hardware have equal bits, on unequal hardware they drift apart."""


class PatternWatch:
    """Keeps the digests of all ranks' patterns from one allocation to the next, so that nobody waits for them."""

    def __init__(self) -> None:
        self._unread: tuple[int | None, DelayedSums] | None = None

    def note(self, step: int | None, digests: torch.Tensor) -> None:
        """Keep the summed digests of step ``step``; None: of now."""
        self._unread = step, DelayedSums(digests)

    def compare(self) -> None:
        """Raise a ``RuntimeError``, on all ranks alike, if the patterns of two ranks differed then."""
        if self._unread is None:
            return
        (step, digests), self._unread = self._unread, None
        if not digests.agree(world_size()):
            when = "" if step is None else f" before step {step}"
            raise RuntimeError(
                f"rank patterns differ between ranks{when}: the run cannot be trusted. Likely causes: ranks started "
                "from different adapters or seeds, or a rank changed lambda by itself"
            )


def compare_lambdas(bound: BoundTriplets, keep: torch.Tensor, compacted: bool) -> None:
    """Raise, on all ranks alike, if replicas hold different lambdas, or one outside of the pattern is not 0.

    Collective; reads from the device.

    Args:
        keep: (num_triplets,) bool, the pattern.
        compacted: only triplets of the pattern are there.
    """
    world = dist.group.WORLD if dist.is_initialized() else None
    values = bound.engine.values()
    lam = torch.zeros(bound.layout.num_triplets, dtype=torch.float64, device=keep.device)
    for k in bound.lams:
        lam[slice(*bound.spans[k])] = values[k].flatten()
    lam = sum_over(bound.engine.shard_group, lam)  # whole, as this rank's replica has it
    mean = sum_over(world, lam.clone()) / world_size()
    differs = ~((lam - mean).abs().max() <= _LAMBDA_TOLERANCE * mean.abs().max())
    outside = differs & False if compacted else (lam * ~keep).any()
    flags = sum_over(world, torch.stack([differs, outside]).double()).tolist()
    for flag, what in zip(flags, ("differ between replicas", "outside of the pattern are not 0"), strict=True):
        if flag:
            raise RuntimeError(
                f"lambdas {what} at the end of the run: it cannot be trusted. A rank changed lambda by itself, or its "
                "memory is faulty"
            )
