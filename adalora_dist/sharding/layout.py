"""The flat buffers in which a rank's spans lie. Pure; no process group.

Bodies of equal shape lie side by side, so that a sum or a product over all of them is one batched operation on a view;
fragments lie at the buffer's end. So every quantity takes a constant number of operations, whatever the number of
matrices. What is too large to lie in memory twice is worked on portion by portion, in one small buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    @property
    def numel(self) -> int:
        return len(self.factors) * self.rows * self.rank


class Portion(NamedTuple):
    """Neighbouring groups and their pieces; the last portion has the fragments, too."""

    groups: range
    pieces: range
    start: int
    stop: int
    """Its elements among all."""


class FlatBuffer:
    """A vector over the elements of a portion, zero at first, and the views of it that the sums need, made once.

    ``pieces``: of each piece of the portion its factor, its place in the local span (None: it is all of that), and a
    view, 1-D, or in the local tensor's shape if it is all of it; ``orthogonal``: those of P and Q;
    ``bodies``: a view for each group, (number of factors, rows, rank); ``transposed``: the same, (.., rank, rows);
    ``stacked``: views by matrix, for groups whose factors hold several, all of one width; None for others;
    ``fragments``: a view of the rest, 1-D, or None in a portion that has none of it.

    Args:
        portion: of the layout; None: all.
        storage: memory to lie in, at least as long as the portion, which others' buffers use at other times.
    """

    def __init__(
        self,
        layout: SpanLayout,
        shapes: Sequence[torch.Size] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        portion: Portion | None = None,
        storage: torch.Tensor | None = None,
    ) -> None:
        self.portion = portion = portion or layout.all
        length = portion.stop - portion.start
        self.data = torch.zeros(length, device=device, dtype=dtype) if storage is None else storage[:length]
        pieces = [layout.pieces[k] for k in portion.pieces]
        self.pieces = [self._placed(p, shapes) for p in pieces]
        self.orthogonal = [placed for placed in self.pieces if layout.factors[placed[0]].orthogonal]
        groups = [layout.groups[k] for k in portion.groups]
        self.bodies = [
            self.data.narrow(0, g.flat_start - portion.start, g.numel).view(-1, g.rows, g.rank) for g in groups
        ]
        self.transposed = [body.transpose(1, 2) for body in self.bodies]
        self.stacked = [
            None if layout.is_padded(g) else _stacked(body, g) for body, g in zip(self.bodies, groups, strict=True)
        ]
        is_last = portion.stop == layout.num_elements
        self.fragments = self.data[layout.fragments_start - portion.start :] if is_last else None

    def _placed(self, piece: Piece, shapes: Sequence[torch.Size] | None) -> tuple[int, slice | None, torch.Tensor]:
        view = self.data.narrow(0, piece.flat_start - self.portion.start, piece.length)
        if not piece.is_whole:
            return piece.factor, slice(piece.local_start, piece.local_start + piece.length), view
        return piece.factor, None, view if shapes is None else view.view(shapes[piece.factor])

    def body(self, group: int) -> torch.Tensor:
        """Of a group of the layout by its number; the group is in the portion."""
        return self.bodies[group - self.portion.groups.start]


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
    if num == 1:
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
        max_portion: elements that a portion may have, if it has more than one body; None: all lie in one portion.
    """

    def __init__(self, factors: Sequence[Factor], spans: Sequence[Span], max_portion: int | None = None) -> None:
        self._max_portion = max_portion
        self.factors = tuple(factors)
        self._has_ragged = any(len(set(f.widths)) > 1 for f in self.factors)
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
        for orthogonal, num_rows, rank, blocks, members in self._within_portions(bodies):
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
        self.all = Portion(range(len(self.groups)), range(len(self.pieces)), 0, flat)
        self.portions = self._cut_portions()
        """Of at most ``max_portion`` elements, but for single bodies and fragments; all elements, in order."""

    def is_padded(self, group: Group) -> bool:
        """Whether its matrices have to be made equally wide: several in a factor, somewhere of unequal widths."""
        return self.pads(group.orthogonal, group.blocks)

    def pads(self, orthogonal: bool, blocks: Sequence[int]) -> bool:
        """The same of a factor whose matrices have these widths."""
        return self._has_ragged and orthogonal and len(blocks) > 1

    def _within_portions(
        self, bodies: dict[tuple[bool, int, int, tuple[int, ...]], list[int]]
    ) -> Iterator[tuple[bool, int, int, tuple[int, ...], list[int]]]:
        """Bodies of one shape, as many as a portion holds at a time; those that are padded last, side by side."""
        in_order = sorted(bodies.items(), key=lambda item: self.pads(item[0][0], item[0][3]))
        for (orthogonal, num_rows, rank, blocks), members in in_order:
            count = len(members) if self._max_portion is None else max(1, self._max_portion // (num_rows * rank))
            for first in range(0, len(members), count):
                yield orthogonal, num_rows, rank, blocks, members[first : first + count]

    def _cut_portions(self) -> list[Portion]:
        first_piece, firsts = 0, [(0, 0, 0)]  # group, piece and element that a portion begins with
        for number, group in enumerate(self.groups):
            stop = group.flat_start + group.numel
            if (
                self._max_portion is not None
                and group.flat_start > firsts[-1][2]
                and (stop - firsts[-1][2] > self._max_portion)
            ):
                firsts.append((number, first_piece, group.flat_start))
            first_piece += len(group.factors)
        ends = [*firsts[1:], (len(self.groups), len(self.pieces), self.num_elements)]
        return [Portion(range(a[0], b[0]), range(a[1], b[1]), a[2], b[2]) for a, b in zip(firsts, ends, strict=True)]

    def views(
        self, locals_: Sequence[torch.Tensor | None], flat: FlatBuffer, orthogonal: bool = False
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Views of local spans, and of the same elements in ``flat``, as far as they are in its portion.

        Args:
            locals_: the local span of each parameter; None: leave it out.
            orthogonal: leave out lambda.
        """
        chosen: list[torch.Tensor] = []
        views: list[torch.Tensor] = []
        for factor, place, view in flat.orthogonal if orthogonal else flat.pieces:
            if (local := locals_[factor]) is not None:
                chosen.append(local if place is None else local.view(-1)[place])
                views.append(view)
        return chosen, views

    def collect(self, locals_: Sequence[torch.Tensor | None], flat: FlatBuffer) -> FlatBuffer:
        """Copy local spans into their places in ``flat``; returns ``flat``."""
        local, views = self.views(locals_, flat)
        if local:
            torch._foreach_copy_(views, local)
        return flat
