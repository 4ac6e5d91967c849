"""The flat buffers in which a rank's spans lie. Pure; no process group.

Bodies of equal shape lie side by side, so that a sum or a product over all of them is one batched operation on a view;
fragments lie at the buffer's end. So every quantity takes a constant number of operations, whatever the number of
matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from adalora_dist.sharding.spans import Factor, Span, cut, cut_rows


class Piece(NamedTuple):
    """Elements that lie together: where they are in a parameter's local span, and where in the flat buffer."""

    factor: int
    local_start: int
    length: int
    flat_start: int
    is_whole: bool
    """Whether it is all that the rank holds of the parameter."""


class Group(NamedTuple):
    """Bodies of one shape, side by side from ``flat_start``: a (len(factors), rows, rank) view."""

    orthogonal: bool
    """Of P and Q, or of lambda."""
    rows: int
    rank: int
    flat_start: int
    factors: tuple[int, ...]
    blocks: tuple[int, ...]
    """Columns of each matrix within a factor, as :attr:`Factor.widths`; the same in all of them."""


class FlatBuffer:
    """A vector over all elements of a rank, zero at first, and the views of it that the sums need, made once.

    ``pieces``: a view for each piece of the layout, 1-D, or in the local tensor's shape if the piece is all of it;
    ``bodies``: a view for each group, (number of factors, rows, rank); ``transposed``: the same, (.., rank, rows);
    ``stacked``: views by matrix, for groups whose factors hold several of one width; None for others;
    ``fragments``: a view of the rest, 1-D.
    """

    def __init__(
        self,
        layout: SpanLayout,
        shapes: Sequence[torch.Size] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.data = torch.zeros(layout.num_elements, device=device, dtype=dtype)
        self.pieces = [self.data.narrow(0, p.flat_start, p.length) for p in layout.pieces]
        if shapes is not None:
            pairs = zip(self.pieces, layout.pieces, strict=True)
            self.pieces = [view.view(shapes[p.factor]) if p.is_whole else view for view, p in pairs]
        self.bodies = [
            self.data[g.flat_start : g.flat_start + len(g.factors) * g.rows * g.rank].view(-1, g.rows, g.rank)
            for g in layout.groups
        ]
        self.transposed = [body.transpose(1, 2) for body in self.bodies]
        self.stacked = [_stacked(body, g) for body, g in zip(self.bodies, layout.groups, strict=True)]
        self.fragments = self.data[layout.fragments_start :]


class Stacked(NamedTuple):
    """Views of a group's bodies, whose factors hold several matrices of one width each."""

    in_place: torch.Tensor
    """(factors, matrices of each, rows, width), not contiguous"""
    as_if: torch.Tensor
    """The same shape, contiguous: the memory as if one matrix lay behind the other."""
    matrices: torch.Tensor
    """``as_if`` as (matrices, rows, width)."""
    transposed: torch.Tensor
    """``as_if`` as (matrices, width, rows)."""


def _stacked(body: torch.Tensor, group: Group) -> Stacked | None:
    num, width = len(group.blocks), group.blocks[0]
    if num == 1 or len(set(group.blocks)) > 1:
        return None
    in_place = body.view(-1, group.rows, num, width).transpose(1, 2)
    as_if = body.view(-1, num, group.rows, width)
    matrices = as_if.view(-1, group.rows, width)
    return Stacked(in_place, as_if, matrices, matrices.transpose(1, 2))


class SpanLayout:
    """Where the elements of one rank's spans lie in a flat buffer.

    Args:
        factors: all adapter parameters, in the same order on every rank.
        spans: this rank's span of each.
    """

    def __init__(self, factors: Sequence[Factor], spans: Sequence[Span]) -> None:
        self.factors = tuple(factors)
        self.num_triplets = max((f.first_triplet + f.rank for f in factors), default=0)
        self.pieces: list[Piece] = []
        self.groups: list[Group] = []
        self._place(spans)

    def _place(self, spans: Sequence[Span]) -> None:
        bodies: dict[tuple[bool, int, int, tuple[int, ...]], list[int]] = {}
        rows_of: dict[int, tuple[int, int]] = {}
        for k, (factor, span) in enumerate(zip(self.factors, spans, strict=True)):
            _, rows, _ = cut(factor, span)
            if rows[1] > rows[0]:
                rows_of[k] = rows
                bodies.setdefault((factor.orthogonal, rows[1] - rows[0], factor.rank, factor.widths), []).append(k)
        flat = 0
        for (orthogonal, num_rows, rank, blocks), members in bodies.items():
            self.groups.append(Group(orthogonal, num_rows, rank, flat, tuple(members), blocks))
            for k in members:
                start, length = rows_of[k][0] * rank - spans[k].start, num_rows * rank
                self.pieces.append(Piece(k, start, length, flat, length == spans[k].stop - spans[k].start))
                flat += num_rows * rank
        self.fragments_start = flat
        self.fragments = cut_rows(self.factors, spans)
        for fragment in self.fragments:
            span, length = spans[fragment.factor], fragment.stop - fragment.start
            start = fragment.row * self.factors[fragment.factor].rank + fragment.start - span.start
            self.pieces.append(Piece(fragment.factor, start, length, flat, length == span.stop - span.start))
            flat += length
        self.num_elements = flat

    def views(
        self, locals_: Sequence[torch.Tensor | None], flat: FlatBuffer, orthogonal: bool = False
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Views of local spans, and of the same elements in ``flat``.

        Args:
            locals_: the local span of each parameter; None: leave it out.
            orthogonal: leave out lambda.
        """
        chosen = [
            (local if p.is_whole else local.view(-1).narrow(0, p.local_start, p.length), view)
            for p, view in zip(self.pieces, flat.pieces, strict=True)
            if (local := locals_[p.factor]) is not None and (self.factors[p.factor].orthogonal or not orthogonal)
        ]
        return [local for local, _ in chosen], [view for _, view in chosen]

    def collect(self, locals_: Sequence[torch.Tensor | None], flat: FlatBuffer) -> FlatBuffer:
        """Copy local spans into their places in ``flat``; returns ``flat``."""
        local, views = self.views(locals_, flat)
        if local:
            torch._foreach_copy_(views, local)
        return flat
