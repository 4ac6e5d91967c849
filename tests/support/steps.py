"""Steps of a training on one process, as a loop of somebody else's makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from adalora_dist.methods.hooks import MethodHooks


def make_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    hooks: MethodHooks,
    loss_of: Callable[[int], torch.Tensor],
    steps: Iterable[int],
) -> list[float]:
    """The loss of each step, with exchanges of parameters between them."""
    losses = []
    for step in steps:
        loss = loss_of(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        hooks.replace(model, optimizer)
    return losses
