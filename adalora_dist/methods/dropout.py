"""Dropout that keeps nothing: backward draws the same numbers again.

``nn.Dropout`` keeps a mask for backward, and the product behind it a copy of the input with zeros in it: for a matrix
of d_in columns three to six bytes for each of its inputs, of which the plain model keeps one copy for all matrices that
read it. Here what is kept is the state of the random numbers before the draw (on GPUs 16 bytes, a seed and a counter;
5 KB on a CPU). The draws are those of ``nn.Dropout``, and so, bit for bit, are outputs and gradients; a checkpoint's
second forward draws them again, too, as it puts the state back.

Which number an element gets follows from where it lies in memory. So all is drawn for contiguous tensors: what comes in
another layout (a transposed sequence of one) is copied first, or its gradient would have other elements dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Dropout(nn.Dropout):
    """``nn.Dropout`` without a mask that waits for backward."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.redraws:
            return super().forward(input)
        dropped: torch.Tensor = _Drop.apply(input.contiguous(), self.p)  # type: ignore[no-untyped-call]
        return dropped

    def product(self, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Dropout of ``x`` (tokens, d_in) times ``weight`` (d_in, r), both in ``dtype``, keeping x, if contiguous no
        copy."""
        if not self.redraws:
            return super().forward(x).to(dtype) @ weight.to(dtype)
        device = x.device.type
        if torch.is_autocast_enabled(device):  # it would take the product into its own type
            dtype = torch.get_autocast_dtype(device)
        hidden: torch.Tensor = _DropProduct.apply(x.contiguous(), weight.to(dtype), self.p)  # type: ignore[no-untyped-call]
        return hidden

    @property
    def redraws(self) -> bool:
        """Whether there is a backward to draw for; a compiler keeps or draws again as it likes."""
        return self.training and self.p > 0 and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        ctx.p, ctx.state = p, _random_state(x.device)
        return nn.functional.dropout(x, p)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        with _drawing_from(ctx.state, gradient.device):
            return nn.functional.dropout(gradient.contiguous(), ctx.p), None


class _DropProduct(torch.autograd.Function):
    """Dropout of x (tokens, d_in), in the type of the weight (d_in, r), times it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, p: float) -> torch.Tensor:
        ctx.p, ctx.state = p, _random_state(x.device)
        ctx.save_for_backward(x, weight)
        return nn.functional.dropout(x, p).to(weight.dtype) @ weight

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[1]:
            with _drawing_from(ctx.state, x.device):
                of_weight = nn.functional.dropout(x, ctx.p).to(weight.dtype).T @ gradient
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight.T).to(x.dtype).contiguous()
            with _drawing_from(ctx.state, x.device):
                of_x = nn.functional.dropout(of_x, ctx.p)
        return of_x, of_weight, None


def _random_state(device: torch.device) -> torch.Tensor:
    """Of the device's own generator; a tensor on the CPU, so that nothing waits for the device."""
    if device.type == "cpu":
        return torch.get_rng_state()
    state: torch.Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def _set_random_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def _drawing_from(state: torch.Tensor, device: torch.device) -> Iterator[None]:
    """In it random numbers are those that came after ``state``; behind it, those that were to come."""
    current = _random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(current, device)
