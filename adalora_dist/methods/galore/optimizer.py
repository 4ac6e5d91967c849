"""AdamW for what is not projected; a plain step along what the method has put in the gradient's place elsewhere.

Being torch's AdamW in everything but the step, it is held, sharded and restored by engines as that is. A projected
parameter has no state here: its averages are of another shape than itself, and are kept by the method.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from adalora_dist.sharding.tensors import local_part


class ProjectedAdamW(torch.optim.AdamW):
    """torch's AdamW over the groups without ``projected``.

    Of a group with it, W <- W - lr G, and then W <- W - lr * weight_decay * W, as the authors' code has the order.
    """

    looks_at_found_inf = True
    """Whether ``found_inf`` (float32 scalar, 1 or 0) is honoured on the device, as fused AdamW does."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken: list[tuple[torch.Tensor, torch.Tensor]] = []
        for group in self.param_groups:
            for p in group["params"] if group["projected"] else ():
                if p.grad is not None:
                    self._follow(local_part(p), local_part(p.grad), group)
                    taken.append((p, p.grad))
                    p.grad = None  # so that AdamW passes over it
        _adamw_step(self)
        for p, gradient in taken:  # ZeRO's buffers
            p.grad = gradient
        return loss

    def _follow(self, p: torch.Tensor, direction: torch.Tensor, group: dict[str, Any]) -> None:
        lr, decay, found_inf = group["lr"], group["weight_decay"], getattr(self, "found_inf", None)
        if found_inf is None:
            p.add_(direction, alpha=-lr)
            if decay:
                p.mul_(1 - lr * decay)
            return
        moved = (p - lr * direction) * (1 - lr * decay)
        p.copy_(torch.where(found_inf > 0, p, moved))


# The bare function: as a method it would run this optimizer's hooks a second time.
_adamw_step: Any = inspect.unwrap(torch.optim.AdamW.step)
