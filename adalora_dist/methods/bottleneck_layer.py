"""``Bottleneck``: the adapter of ``bottleneck.py``'s methods, and what leaves some of them out of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn import functional

from adalora_dist.backbones.linears import norm_width
from adalora_dist.config.methods.bottleneck import Activation
from adalora_dist.methods.branch import BranchLinear, BranchStep, drawn_number
from adalora_dist.methods.positions import layer_of

Form = Literal["behind", "before", "beside", "norm"]
"""What an adapter reads and changes: the output of its matrix; its input; its input and its output; a norm."""
ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "tanh": torch.tanh,
}


class Depth:
    """How many of the lowest layers are left out of a step; one object for all adapters of a model."""

    def __init__(self, most: int, seed: int) -> None:
        self.most, self.seed = most, seed
        self.now = 0
        self._copies: dict[torch.device, torch.Tensor] = {}

    def at(self, step: int) -> int:
        """The number that is drawn for ``step``."""
        return drawn_number(self.seed, step, 0, self.most)

    def draw(self, step: int) -> None:
        self.now = self.at(step)
        for held in self._copies.values():
            held.fill_(self.now)

    def on(self, device: torch.device) -> torch.Tensor:
        """:attr:`now` as an int64 scalar, which later draws change in place."""
        if device not in self._copies:
            self._copies[device] = torch.tensor(self.now, device=device)
        return self._copies[device]


class Bottleneck(BranchLinear):
    """Around a linear map, or in the form ``norm`` around a norm.

    Parameters, float32; d_read and d_written are what :func:`widths` says:
        D: (r, d_read); U: (d_written, r).
        c_d: (r,); c_u: (d_written,), both 0 at the start; only with ``biases``.
    """

    def __init__(
        self,
        base: nn.Module,
        name: str,
        width: int,
        form: Form,
        activation: Activation,
        biases: bool,
        dropout: float = 0.0,
        depth: Depth | None = None,
    ) -> None:
        super().__init__(base, name, width, dropout=dropout)
        self.form, self.activation, self.depth, self.layer = form, activation, depth, layer_of(name)
        if form == "norm":
            self.d_in = self.d_out = norm_width(base) or 0
        read, written = widths(form, (self.d_out, self.d_in))
        self.D, self.U = self.vector(width, read), self.vector(written, width)
        self.c_d = self.vector(width) if biases else None
        self.c_u = self.vector(written) if biases else None

    @torch.no_grad()
    def reset(self, init: str, generator: torch.Generator) -> None:
        for matrix in (self.D, self.U):
            drawn = torch.empty(matrix.shape)
            if init == "truncated":
                nn.init.trunc_normal_(drawn, std=0.01, a=-0.02, b=0.02, generator=generator)
            else:
                drawn.normal_(std=0.02, generator=generator)
            matrix.copy_(drawn)
        if init == "zero":
            self.U.zero_()

    def added(self, h: torch.Tensor) -> torch.Tensor:
        """f(h), in the type of h."""
        h = h if self.dropout is None else self.dropout(h)
        d, u, c_d, c_u = (None if p is None else p.to(h.dtype) for p in (self.D, self.U, self.c_d, self.c_u))
        hidden = ACTIVATIONS[self.activation](functional.linear(h, cast(torch.Tensor, d), c_d))
        f = functional.linear(hidden, cast(torch.Tensor, u), c_u)
        if self.depth is not None and self.training:
            f = f * (self.depth.on(f.device) <= self.layer)
        return f.to(h.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == "before":
            return cast(torch.Tensor, self.base(x + self.added(x)))
        y = cast(torch.Tensor, self.base(x))
        if self.form == "norm":
            return cast(torch.Tensor, self.base(x + self.added(y)))
        return y + self.added(x if self.form == "beside" else y)

    def description(self) -> dict[str, Any]:
        said = {"form": self.form, "activation": self.activation, "biases": self.c_d is not None}
        drop = {} if self.depth is None else {"drop_layers": self.depth.most, "seed": self.depth.seed}
        return super().description() | said | drop


def widths(form: Form, shape: tuple[int, int]) -> tuple[int, int]:
    """How many numbers an adapter reads and writes, of a matrix (d_out, d_in)."""
    d_out, d_in = shape
    return {"behind": (d_out, d_out), "before": (d_in, d_in), "beside": (d_in, d_out), "norm": (d_out, d_out)}[form]


class DropStep(BranchStep):
    """Draws which layers are left out of a step."""

    def __init__(self, layers: Sequence[BranchLinear], depth: Depth) -> None:
        super().__init__(layers)
        self._depth = depth

    def begin(self, step: int) -> None:
        self._depth.draw(step)

    def record(self, step: int) -> dict[str, float]:
        return {"dropped_layers": self._depth.at(step)}
