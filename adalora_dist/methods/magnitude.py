"""What DoRA, DVoRA and AdaDoRA share: the rows of an adapted weight get lengths that are trained on their own.

W' = diag(m) V / |V| with V = W0 + W A, where |.| is of each row and counts as a constant in the gradient (DoRA, section
4.3). Trained is dm = m - |W0|, which starts at 0: the same steps as those of m, and whoever reads dm from a checkpoint
needs no W0 for it.

The norms come without the product W A and without opening W0:

    |V_j|^2 = |W0_j|^2 + 2 sum_k (W0 A^T)_jk W_jk + sum_k (W (A A^T))_jk W_jk.

W0 A^T is what the base makes of A's rows, within its call in a forward: once per optimizer step, as W and A change only
then. |W0_j| is read from the weight once, while the base computes: then every engine has it whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from adalora_dist.backbones.linears import has_readable_weight, weight_of
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adapter import device_of
from adalora_dist.methods.branch import BranchLinear, BranchStep, add_product
from adalora_dist.methods.dropout import Dropout
from adalora_dist.methods.protocol import Adapter, Step, StepState
from adalora_dist.methods.update import Matrix, OfMatrix
from adalora_dist.sharding.tensors import is_whole


class RowLengths(Adapter):
    """``y = b + diag(c) (W0 + W A) x`` with c = m / |V|; the bias b is not scaled. What W and A are, says another base.

    Where a row of W0 is 0, its length cannot be changed by a factor: c = 1 there, and dm stays 0.

    With dropout, W A and the part c - 1 of W0 see the input with dropout, as the authors have it, and W0 the whole one.

    Parameter:
        dm: (d_out,), float32, 0 at the start.
    """

    d_in: int
    d_out: int
    dropout: Dropout | None
    dm: nn.Parameter

    keeps_norms = False
    """Whether somebody says when weights have changed, as :class:`LengthsStep` does."""

    def add_lengths(self) -> None:
        """The last that a constructor does.

        Raises:
            UserError: the base holds its weight in a form that cannot be read.
        """
        if not has_readable_weight(self.base):
            raise UserError(
                f"targets: {self.name} is a {type(self.base).__name__}, whose rows have no lengths that can be read: "
                "leave it out of targets, or set method to lora"
            )
        self.dm = nn.Parameter(torch.zeros(self.d_out, dtype=torch.float32, device=device_of(self.base)))
        self._lengths: torch.Tensor | None = None  # |W0_j|, (d_out,)
        self._bias: torch.Tensor | None = None
        self._norms: torch.Tensor | None = None  # |V_j|, (d_out,)
        self._versions: tuple[int, ...] = ()

    def branch(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of :class:`BranchLinear`: A x (tokens, r) and W (d_out, r), the scale included."""
        raise NotImplementedError(f"{type(self).__name__}.branch")

    def onto(self, y: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, in_place: bool = False) -> torch.Tensor:
        """As of :class:`BranchLinear`."""
        return add_product(y, hidden, weight, in_place)

    def outer(self, weight: torch.Tensor) -> torch.Tensor:
        """W (d_out, r), of the second that :meth:`branch` gives."""
        return weight

    def inner(self) -> torch.Tensor:
        """A (r, d_in), as the branch multiplies it."""
        raise NotImplementedError(f"{type(self).__name__}.inner")

    def made_of(self) -> list[torch.Tensor]:
        """The parameters that W and A are made of."""
        return [p for p in self.parameters(recurse=False) if p is not self.dm]

    def release(self) -> None:
        """Forget the norms: what they were made of has changed."""
        self._norms = None

    @property
    def num_zero_rows(self) -> int:
        """Rows of W0 without a direction; known after the first forward. Reads from the device."""
        return 0 if self._lengths is None else int((self._lengths == 0).sum())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, self.d_in)
        dropped = self.dropout(tokens) if self.dropout is not None and self.training else tokens
        rows = [tokens] if dropped is tokens else [tokens, dropped]
        measures = not self._has_norms()
        (y, *others), of_a = self._call_base(rows, measures)
        hidden, weight = self.branch(dropped.to(y.dtype))
        if of_a is not None:
            self._measure(of_a, weight)
        whole = self.onto(y, hidden, weight)
        changed = self.onto(others[0], hidden, weight) if others else whole
        if self._bias is not None:
            changed = changed - self._bias.to(y.dtype)
        # Not c z: what is rounded to a half precision is then small, and nothing where nothing was learnt.
        y = torch.addcmul(whole, changed, (self._factor() - 1).to(y.dtype))
        return y.view(*x.shape[:-1], self.d_out)

    def _factor(self) -> torch.Tensor:
        """c, (d_out,)."""
        assert self._lengths is not None and self._norms is not None
        is_zero = self._lengths == 0
        return torch.where(is_zero, 1.0, (self._lengths + self.dm) / torch.where(is_zero, 1.0, self._norms))

    def _call_base(self, rows: list[torch.Tensor], measures: bool) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """What the base makes of each of several sets of rows, and, if it ``measures``, of A's, (r, d_out).

        In one call, as an engine may gather for each. A's are not among the rows of that call: a checkpoint's second
        forward, which finds the norms measured, would keep other shapes than the first (ZeRO-3 keeps inputs of frozen
        maps, too).
        """
        known, made = self._lengths is not None and self._lengths.device == rows[0].device, list[torch.Tensor]()

        @torch.no_grad()
        def look(base: nn.Module, *_: Any) -> None:
            if not known:
                self._read_base(base)
            if measures:
                made.append(base.forward(self.inner().to(rows[0].dtype)))

        handle = None if known and not measures else self.base.register_forward_pre_hook(look)
        try:
            y = self.base(torch.cat(rows) if len(rows) > 1 else rows[0])
        finally:
            if handle is not None:
                handle.remove()
        return list(y.split([len(r) for r in rows])) if len(rows) > 1 else [y], made[0] if made else None

    @torch.no_grad()
    def _read_base(self, base: nn.Module) -> None:
        weight, bias = weight_of(base), getattr(base, "bias", None)
        self._lengths = torch.linalg.vector_norm(weight, dim=1, dtype=torch.promote_types(weight.dtype, torch.float32))
        self._bias = None if bias is None else bias.detach().clone()

    def _has_norms(self) -> bool:
        """Whether the norms are those of the weights as they are now."""
        made_of = self.made_of()
        before, self._versions = self._versions, tuple(p._version for p in made_of)
        if self._norms is None or self._norms.device != self.dm.device or self._versions != before:
            return False
        return self.keeps_norms or (not self.training and all(map(is_whole, made_of)))

    @torch.no_grad()
    def _measure(self, of_a: torch.Tensor, weight: torch.Tensor) -> None:
        """
        Args:
            of_a: what the base has made of A's rows, (r, d_out).
            weight: the second that :meth:`branch` gives, (d_out, r).
        """
        assert self._lengths is not None
        with torch.autocast(of_a.device.type, enabled=False):
            w, a = self.outer(weight), self.inner()
            of_a = of_a if self._bias is None else of_a - self._bias.to(of_a.dtype)
            crossed = (of_a.to(w.dtype).T * w).sum(dim=1)
            squared = ((w @ (a @ a.T)) * w).sum(dim=1)
            self._norms = (self._lengths.square() + 2 * crossed + squared).clamp_min(0).sqrt()


class MagnitudeLinear(RowLengths, BranchLinear):
    """Around a branch."""

    def __init__(self, base: nn.Module, name: str, rank: int, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(base, name, rank, scale, dropout)
        self.add_lengths()


class LengthsStep(Step):
    """Norms are those of the weights of a step. Stands before the step that the method has besides."""

    def __init__(self, layers: Sequence[RowLengths], *others: Any) -> None:
        super().__init__(layers, *others)
        self._with_lengths = list(layers)
        for layer in layers:
            layer.keeps_norms = True

    def after(self, step: int) -> None:
        super().after(step)
        self._release()

    def load_state(self, state: StepState) -> None:
        super().load_state(state)
        self._release()

    def _release(self) -> None:
        for layer in self._with_lengths:
            layer.release()

    def notice(self, step: int, learning_rate: Callable[[int], float]) -> str:
        """Besides, at the first step, how many rows have no direction."""
        said = super().notice(step, learning_rate)
        if step or not (count := sum(layer.num_zero_rows for layer in self._with_lengths)):
            return said
        rows = f"{count} rows of the adapted weights are 0: their lengths are not trained, what is added to them is"
        return f"{rows}; {said}" if said else rows


class MagnitudeStep(LengthsStep, BranchStep):
    """Of methods whose ranks stay as they are."""

    def __init__(self, layers: Sequence[MagnitudeLinear]) -> None:
        super().__init__(layers)


@dataclass(frozen=True)
class MagnitudeUpdate(OfMatrix):
    """Base of updates with lengths: ``matrix``, dm (d_out,), and what is added to W0 before rows get their lengths."""

    matrix: Matrix
    dm: torch.Tensor

    formula: ClassVar[str] = "W = diag(|W0| + dm) V / |V|, |.| of rows, V = W0 + scale * P Q; rows that are 0 in W0: V"

    def added(self) -> torch.Tensor:
        """V - W0, (d_out, d_in)."""
        raise NotImplementedError(f"{type(self).__name__}.added")

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Row by row from the base's own length, whichever base it is: the original or the dequantised."""
        rows = weight.T if self.matrix.is_transposed else weight
        lengths = torch.linalg.vector_norm(rows, dim=1)
        rows += self.added()
        factors = (lengths + self.dm) / torch.linalg.vector_norm(rows, dim=1)
        rows *= torch.where(lengths == 0, 1.0, factors).unsqueeze(1)
        return weight
