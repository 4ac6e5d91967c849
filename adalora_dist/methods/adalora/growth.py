"""Whether triplets have a signal when pruning begins: one line at t_i, a warning with the remedy where not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from adalora_dist.config.methods import AdaptiveConfig
from adalora_dist.methods.adalora.bound import BoundTriplets
from adalora_dist.methods.adalora.layers import TripletLayer
from adalora_dist.methods.adalora.schedule import BudgetSchedule
from adalora_dist.sharding.base import sum_over

SMALLEST_GROWTH = 0.1
"""Below this pruning would choose by noise. A LoRA whose steps had no common direction at all is at 1."""


@torch.no_grad()
def growth(bound: BoundTriplets, layers: Sequence[TripletLayer], rates: Sequence[float]) -> float:
    """How far the update has left 0, in units of what a LoRA's would have if its steps had no common direction.

    The mean over triplets of |lambda_i P_i Q_i|_F over sqrt(sum of rates^2) sqrt(d_out / 3): under Adam an element of
    LoRA's B moves by about the learning rate in a step, so its root mean square after steps in random directions is the
    first root, and the row of A beside it has length sqrt(1/3). Collective; reads from the device. Between two steps.

    Args:
        rates: the learning rate of P in each step so far.
    """
    world = dist.group.WORLD if dist.is_initialized() else None
    p, lam, q = sum_over(world, bound.mean_squares())
    d_in = [layer.d_in for layer in layers for _ in range(layer.rank)]
    sizes = (p * lam * q * torch.tensor(d_in, device=p.device) * 3).sqrt()  # over sqrt(d_out / 3)
    unit = math.sqrt(math.fsum(rate**2 for rate in rates))
    return float(sizes.mean()) / unit if unit else 0.0  # a warm-up may begin at a rate of 0


def growth_line(grown: float, config: AdaptiveConfig, schedule: BudgetSchedule) -> str:
    """What :func:`growth` found at t_i, in one line."""
    found = f"the update has grown to {grown:.2g} of what LoRA's steps would make of it without a common direction"
    if grown >= SMALLEST_GROWTH or schedule.target_budget == schedule.initial_budget:
        return f"pruning begins; {found}"
    remedies = ["start matched"] if config.start == "paper" else []
    remedies += ["a higher learning_rate", f"more initial_warmup_steps than {schedule.initial_warmup_steps}"]
    return (
        f"warning: pruning begins before triplets have a signal: {found}, must be >= {SMALLEST_GROWTH:g}; use "
        f"{' or '.join(remedies)}"
    )
