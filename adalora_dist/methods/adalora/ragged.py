"""Matrices of unequal widths side by side in their factors, as experts' after compaction: made equally wide at once.

What a narrow matrix lacks are copies of its last column; whoever takes the products leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from adalora_dist.sharding.layout import Portion, SpanLayout


class EqualRows(NamedTuple):
    """The matrices of a portion that have the same number of rows here."""

    rows: int
    slots: slice | torch.Tensor
    """Which they are among all matrices."""
    values: torch.Tensor
    """(matrices, rows, width), as last copied."""
    products: torch.Tensor
    """The like."""
    grams: torch.Tensor | None
    """A view of theirs among those of all matrices; None where they are no run."""
    factors: torch.Tensor | None


class RaggedGroups:
    """Those of one portion, copied to a buffer as (matrices, rows, width), and products from there into their places.

    Two indices of 4 bytes are kept for each element, in the place of operations for each factor.

    Args:
        width: of every matrix in the buffer, in columns.
        slots_of: of a factor, the size of its matrices, and which they are among all of that size.
        grams: of all matrices, (n, width, width), in the type of the flat buffers.
        factors: what they are multiplied by, the like.
    """

    def __init__(
        self,
        layout: SpanLayout,
        portion: Portion,
        width: int,
        slots_of: Callable[[int], tuple[int, Sequence[int]]],
        grams: torch.Tensor,
        factors: torch.Tensor,
    ) -> None:
        groups = [group for group in (layout.groups[k] for k in portion.groups) if layout.is_padded(group)]
        self._start = groups[0].flat_start - portion.start
        self._stop = groups[-1].flat_start + groups[-1].numel - portion.start
        by_rows: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        slots: dict[int, list[int]] = {}
        for group in groups:
            blocks = torch.tensor(group.blocks).view(-1, 1, 1)
            column = torch.arange(width)
            columns = column.minimum(blocks - 1) + (blocks.cumsum(0) - blocks)  # where there is none, the matrix's last
            rows = torch.arange(len(group.factors) * group.rows).view(-1, 1, group.rows, 1)
            elements = group.flat_start - portion.start + rows * group.rank + columns
            is_column = (column < blocks).expand_as(elements)
            by_rows.setdefault(group.rows, []).append((elements.flatten(), is_column.flatten()))
            slots.setdefault(group.rows, []).extend(slot for k in group.factors for slot in slots_of(k)[1])
        parts = [part for of_rows in by_rows.values() for part in of_rows]
        sources = torch.cat([elements for elements, _ in parts])
        real = torch.cat([is_column for _, is_column in parts]).nonzero().flatten()
        places = torch.empty(self._stop - self._start, dtype=torch.int32)
        places[sources[real] - self._start] = real.int()
        self._sources, self._places = sources.int().to(grams.device), places.to(grams.device)
        self._values, self._products = (grams.new_empty(len(sources)) for _ in range(2))
        sizes = [len(of_rows) * num_rows * width for num_rows, of_rows in slots.items()]
        pieces = zip(slots.items(), self._values.split(sizes), self._products.split(sizes), strict=True)
        self._grams, self._factors = grams, factors
        self._equal_rows = []
        for (num_rows, of_rows), values, products in pieces:
            own = as_slice(of_rows, grams.device)
            in_place = (grams[own], factors[own]) if isinstance(own, slice) else (None, None)
            shaped = (piece.view(-1, num_rows, width) for piece in (values, products))
            self._equal_rows.append(EqualRows(num_rows, own, *shaped, *in_place))

    def covered(self) -> int:
        """How many matrices' products :meth:`write_grams` writes without a copy."""
        return sum(len(part.values) for part in self._equal_rows if part.grams is not None)

    def copy(self, data: torch.Tensor) -> None:
        """From a flat buffer of the portion."""
        torch.index_select(data, 0, self._sources, out=self._values)

    def write_grams(self) -> None:
        """X^T X of what was copied, to its places."""
        for part in self._equal_rows:
            if part.grams is not None:
                torch.bmm(part.values.mT, part.values, out=part.grams)
            else:
                self._grams[part.slots] = torch.bmm(part.values.mT, part.values)

    def write_products(self, data: torch.Tensor) -> None:
        """X F of what was copied, into a flat buffer of the portion."""
        for part in self._equal_rows:
            factors = self._factors[part.slots] if part.factors is None else part.factors
            torch.bmm(part.values, factors, out=part.products)
        torch.index_select(self._products, 0, self._places, out=data[self._start : self._stop])


def as_slice(slots: Sequence[int], device: torch.device | str) -> slice | torch.Tensor:
    """Indices as a slice where they are a run."""
    is_run = list(slots) == list(range(slots[0], slots[-1] + 1))
    return slice(slots[0], slots[-1] + 1) if is_run else torch.tensor(slots, device=device)


def padded_places(widths: Sequence[int], width: int) -> list[int]:
    """Where each column lies if every matrix had ``width``: (2, 1) with 2 gives [0, 1, 2]."""
    return [k * width + column for k, own in enumerate(widths) for column in range(own)]
