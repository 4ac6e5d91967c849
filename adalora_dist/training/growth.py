"""Whether triplets have a signal when pruning begins: one line at t_i, a warning with the remedy where not."""

from __future__ import annotations

from collections.abc import Sequence

from adalora_dist.allocator import RankAllocator

SMALLEST_GROWTH = 0.1
"""Below this pruning would choose by noise. A LoRA whose steps had no common direction at all is at 1."""


def growth_line(allocator: RankAllocator, rates: Sequence[float]) -> str:
    """What :meth:`RankAllocator.growth` says at t_i, in one line. Collective; reads from the device.

    Args:
        rates: the learning rate of P in each step so far.
    """
    growth, config = allocator.growth(rates), allocator.config
    found = f"the update has grown to {growth:.2g} of what LoRA's steps would make of it without a common direction"
    if growth >= SMALLEST_GROWTH or allocator.schedule.target_budget == allocator.schedule.initial_budget:
        return f"pruning begins; {found}"
    remedies = ["start matched"] if config.start == "paper" else []
    remedies += ["a higher learning_rate", f"more initial_warmup_steps than {allocator.schedule.initial_warmup_steps}"]
    return (
        f"warning: pruning begins before triplets have a signal: {found}, must be >= {SMALLEST_GROWTH:g}; use "
        f"{' or '.join(remedies)}"
    )
