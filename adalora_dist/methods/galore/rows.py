"""Which rows of a matrix a rank's span touches, and which rows several ranks have parts of. Pure.

A flat slice (ZeRO) may begin and end inside of a row. The rank then works on a block of whole rows with zeros where it
holds nothing: products with it are this rank's part of a sum over ranks. Rows of the block that are cut get such a sum;
all others are complete, as is every row where rows are sharded (FSDP2) or nothing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adalora_dist.sharding.spans import Span


@dataclass(frozen=True)
class Rows:
    """What one rank holds of an (m, n) matrix.

    Args:
        shape: (m, n).
        span: of this rank.
        cut: all rows of the matrix that are cut, ascending; the same on every rank.
    """

    shape: tuple[int, int]
    span: Span
    cut: tuple[int, ...]

    @property
    def first(self) -> int:
        return self.span.start // self.shape[1]

    @property
    def stop(self) -> int:
        """Behind the last row that is touched."""
        return -(-self.span.stop // self.shape[1]) if self.span.stop > self.span.start else self.first

    @property
    def own_cut(self) -> list[tuple[int, int]]:
        """(place in the block, place in ``cut``) of every cut row that this rank has a part of."""
        return [(row - self.first, slot) for slot, row in enumerate(self.cut) if self.first <= row < self.stop]

    def block(self, local: torch.Tensor) -> torch.Tensor:
        """The rows that the span touches, (stop - first, n), 0 where it has nothing; a view if it is whole rows."""
        flat, n = local.reshape(-1), self.shape[1]
        if flat.numel() != (self.stop - self.first) * n:
            padded = flat.new_zeros((self.stop - self.first) * n)
            self.part(padded).copy_(flat)
            flat = padded
        return flat.view(-1, n)

    def part(self, block: torch.Tensor) -> torch.Tensor:
        """The span's elements of such a block, flat; a view."""
        start = self.span.start - self.first * self.shape[1]
        return block.reshape(-1)[start : start + self.span.stop - self.span.start]

    def complete(self, block: torch.Tensor, cut_rows: torch.Tensor) -> torch.Tensor:
        """The block with each cut row whole on the rank that has its beginning, and 0 on the others.

        Args:
            cut_rows: (len(cut), n), the whole rows.
        """
        if not self.own_cut:
            return block
        block = block.clone()
        for place, slot in self.own_cut:
            begins_here = self.span.start <= (self.first + place) * self.shape[1]
            block[place] = cut_rows[slot] if begins_here else 0
        return block


def cut_rows(shape: tuple[int, int], spans: Sequence[Span]) -> tuple[int, ...]:
    """The rows of an (m, n) matrix that are cut, given the spans of all ranks."""
    n = shape[1]
    borders = {border for span in spans if span.stop > span.start for border in span}
    return tuple(sorted({border // n for border in borders if border % n}))
