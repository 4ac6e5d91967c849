"""Factors whose matrices differ in width, as experts' after compaction: made equally wide for a forward's products.

Columns are added at the end of each matrix. Factors with the same number of rows lie side by side meanwhile, so that
the number of operations is that of the sizes, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from adalora_dist.sharding.tensors import awaits_gradient


class Ragged(NamedTuple):
    """A factor, (rows, sum of widths)."""

    rows: int
    widths: tuple[int, ...]
    """Columns of each of its matrices."""
    width: int
    """What all of them get."""
    fill: bool
    """Whether the columns that are added have to be 0. Where they meet zeros in the next product, any finite ones will
    do."""


class Widening:
    """Makes (rows, number of matrices * width) of each of some factors, always the same ones."""

    def __init__(self, factors: Sequence[Ragged]) -> None:
        members: dict[int, list[int]] = {}
        for k, factor in enumerate(factors):
            members.setdefault(factor.rows, []).append(k)
        self._parts = [(of_size, _SideBySide([factors[k] for k in of_size])) for of_size in members.values()]

    def __call__(self, factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The gradient of every column comes from where it was put."""
        found: dict[int, torch.Tensor] = {}
        widen: Callable[..., tuple[torch.Tensor, ...]] = _Widen.apply
        for of_size, part in self._parts:
            found.update(zip(of_size, widen(part, *(factors[k] for k in of_size)), strict=True))
        return [found[k] for k in range(len(factors))]


class _SideBySide:
    """Factors of one number of rows."""

    def __init__(self, factors: Sequence[Ragged]) -> None:
        self._narrow = [sum(factor.widths) for factor in factors]
        self._wide = [len(factor.widths) * factor.width for factor in factors]
        self._fill = any(factor.fill for factor in factors)
        sources: list[int] = []  # of each column of the wide factors, what it is a copy of, if it need not be 0
        places: list[int] = []  # of each column of the narrow ones, where it goes
        last = sum(self._narrow) - 1
        for factor in factors:
            for own in factor.widths:
                sources += [min(len(places) + k, last) for k in range(factor.width)]
                places += range(len(sources) - factor.width, len(sources) - factor.width + own)
        self._indices = {torch.device("cpu"): (torch.tensor(sources), torch.tensor(places))}

    def _indices_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._indices:
            sources, places = self._indices[torch.device("cpu")]
            self._indices[device] = sources.to(device), places.to(device)
        return self._indices[device]

    def widen(self, factors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        joined = torch.cat(list(factors), dim=1) if len(factors) > 1 else factors[0]
        sources, places = self._indices_on(joined.device)
        if self._fill:
            wide = joined.new_zeros(len(joined), len(sources)).index_copy_(1, places, joined)
        else:
            wide = joined.index_select(1, sources)
        return wide.split(self._wide, dim=1) if len(factors) > 1 else (wide,)

    def narrow(self, gradients: Sequence[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        """What arrived for each column; None for a factor for which nothing did."""
        arrived = next((gradient for gradient in gradients if gradient is not None), None)
        if arrived is None:
            return gradients
        pairs = zip(gradients, self._wide, strict=True)
        given = [arrived.new_zeros(len(arrived), n) if gradient is None else gradient for gradient, n in pairs]
        _, places = self._indices_on(arrived.device)
        if len(given) == 1:
            return [arrived.index_select(1, places)]
        joined = torch.cat(given, dim=1).index_select(1, places)
        split: Any = torch.split_with_sizes_copy  # whose stub has it return nothing
        pieces = split(joined, self._narrow, dim=1)
        return [None if gradient is None else piece for gradient, piece in zip(gradients, pieces, strict=True)]


class _Widen(torch.autograd.Function):
    """Nothing is kept as a saved tensor, so that two forwards may share it and go backward one after the other."""

    @staticmethod
    def forward(ctx: Any, part: _SideBySide, *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        # Where no gradient comes back there is none, but for an engine that would stumble over it.
        ctx.part, ctx.awaited = part, [factor if awaits_gradient(factor) else None for factor in factors]
        return part.widen(factors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        pairs = zip(ctx.part.narrow(gradients), ctx.awaited, strict=True)
        return None, *(torch.zeros_like(p) if g is None and p is not None else g for g, p in pairs)
