"""What optimizers remember of a parameter: which of them keep an entry per weight, and how such state is cut and made.

An entry per weight can go wherever its weight goes: to another engine and number of processes, and out of memory with
it. What is kept in blocks or as sums over rows and columns (8 bit, Adafactor) cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from adalora_dist.io.errors import UserError

State = dict[str, torch.Tensor]
"""What an optimizer remembers of one parameter, by the optimizer's own names: the local span of what has an entry per
weight (``exp_avg``, ``exp_avg_sq``), and ``step`` as a tensor without dimension. Empty before the first step."""

_ADAM = ("step", "exp_avg", "exp_avg_sq")
_NAMES: dict[type[torch.optim.Optimizer], Callable[[Mapping[str, Any]], tuple[str, ...]]] = {
    torch.optim.AdamW: lambda options: (*_ADAM, *["max_exp_avg_sq"] * options["amsgrad"]),
    torch.optim.Adam: lambda options: (*_ADAM, *["max_exp_avg_sq"] * options["amsgrad"]),
    torch.optim.SGD: lambda options: ("momentum_buffer",) * (options["momentum"] != 0),
    torch.optim.RMSprop: lambda options: (
        *("step", "square_avg"),
        *["momentum_buffer"] * (options["momentum"] > 0),
        *["grad_avg"] * options["centered"],
    ),
    torch.optim.Adagrad: lambda options: ("step", "sum"),
}
"""What a step leaves of a parameter, by the optimizer's class and its options."""
KNOWN = "torch's AdamW, Adam, SGD, RMSprop or Adagrad"


def keeps_an_entry_per_weight(optimizer: Any) -> bool:
    """Whether the state of a torch optimizer, which nothing lies around, can be kept, cut and made anew."""
    return isinstance(optimizer, tuple(_NAMES))


def local_state(state: Mapping[str, Any], holder: torch.Tensor, cut: Callable[[Any], torch.Tensor]) -> State:
    """What ``cut`` takes out of each tensor of ``state``.

    Args:
        state: the optimizer's, of ``holder``, the tensor that it steps.
        cut: the span of a parameter, as a view, out of a tensor of ``holder``'s shape.

    Raises:
        UserError: a tensor of another shape.
    """
    found = {}
    for name, value in state.items():
        if name == "step":
            found[name] = torch.as_tensor(value).detach()
        elif torch.is_tensor(value) and value.shape == holder.shape:
            found[name] = cut(value)
        else:
            raise UserError(
                f"the optimizer's state {name} does not have one entry per weight: use torch.optim.AdamW or another "
                "optimizer that keeps its moments unpacked"
            )
    return found


def ready_state(optimizer: torch.optim.Optimizer, holder: torch.Tensor) -> dict[str, Any]:
    """The optimizer's state of ``holder``; if there is none, as its first step would make it, and 0.

    Raises:
        UserError: it is not known what the optimizer keeps.
    """
    state: dict[str, Any] = optimizer.state[holder]
    if not state:
        names = next((names for kind, names in _NAMES.items() if isinstance(optimizer, kind)), None)
        if names is None:
            raise UserError(
                f"the state of {type(optimizer).__name__} cannot be restored before its first step: use {KNOWN}"
            )
        options = optimizer.defaults
        on_device = options.get("capturable") or options.get("fused")
        for name in names(options):
            if name == "step":
                state[name] = torch.zeros((), dtype=torch.float32, device=holder.device if on_device else "cpu")
            else:
                state[name] = torch.zeros_like(holder, memory_format=torch.preserve_format)
    return state


def restore_state(
    optimizer: torch.optim.Optimizer, holder: torch.Tensor, cut: Callable[[Any], torch.Tensor], saved: State
) -> None:
    """Set what ``cut`` takes out of the optimizer's state of ``holder``; all of it goes if nothing was saved.

    Raises:
        UserError: as :func:`ready_state`; the optimizer keeps other state than was saved.
    """
    if not saved:
        optimizer.state.pop(holder, None)
        return
    state = ready_state(optimizer, holder)
    if state.keys() != saved.keys():
        raise UserError(
            f"the optimizer keeps {', '.join(sorted(state))}, saved were {', '.join(sorted(saved))}: continue with the "
            "optimizer that the run was started with"
        )
    for name, value in saved.items():
        if name != "step":
            cut(state[name]).copy_(value)
        elif torch.is_tensor(state[name]):
            state[name].fill_(float(value))
        else:
            state[name] = int(value)
