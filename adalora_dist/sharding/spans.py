"""Spans: what a rank holds of each adapter parameter, and the rows that it holds only in part. Pure.

Every adapter parameter is a row-major matrix with a column per triplet: of each adapted matrix P (d_out rows) and Q^T
(d_in rows), and of the whole model lambda (1 row). Matrices that are one parameter of the model (experts) have theirs
side by side. A span of it is a run of whole rows, the *body*, with at most one partial row at either end, the
*fragments* (flat slices cut rows, and every engine that shards cuts lambda's).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple


class Span(NamedTuple):
    """Elements [start, stop) of a flattened full tensor; empty when start == stop."""

    start: int
    stop: int


def overlaps(span: Span, sizes: Sequence[int]) -> list[Span]:
    """What ``span`` of a flat tensor has of each of the parts that lie in it one after the other, as spans of these."""
    found, first = [], 0
    for size in sizes:
        found.append(Span(*(min(max(edge - first, 0), size) for edge in span)))
        first += size
    return found


FactorKind = Literal["P", "lam", "Qt"]
FACTORS_OF_MATRIX: tuple[FactorKind, ...] = ("P", "Qt")
"""What every adapted matrix has of its own; lambda is one vector for all of them (methods/adalora/layers.py)."""


@dataclass(frozen=True)
class Factor:
    """One adapter parameter: a (rows, rank) matrix whose columns belong to consecutive triplets."""

    kind: FactorKind
    rows: int
    rank: int
    first_triplet: int
    blocks: tuple[int, ...] = ()
    """How many of the columns each matrix has that lies in it, of those with columns; (): all belong to one."""

    @property
    def widths(self) -> tuple[int, ...]:
        """``blocks``, also of one matrix."""
        return self.blocks or (self.rank,)

    @property
    def numel(self) -> int:
        return self.rows * self.rank

    @property
    def orthogonal(self) -> bool:
        """Whether the regulariser acts on this parameter."""
        return self.kind != "lam"


class Fragment(NamedTuple):
    """Part of one row of one parameter: columns [start, stop)."""

    factor: int
    row: int
    start: int
    stop: int


def cut(factor: Factor, span: Span) -> tuple[Fragment | None, tuple[int, int], Fragment | None]:
    """A span as its partial first row, whole rows [first, last), and partial last row; None: no partial row there.

    The fragments do not know which factor this is, and say -1; the caller replaces it.
    """
    if span.start >= span.stop:
        return None, (0, 0), None
    r = factor.rank
    first_row, head = divmod(span.start, r)
    last_row, tail = divmod(span.stop, r)
    if first_row == last_row:  # within a single row, and not all of it
        return Fragment(-1, first_row, head, tail), (0, 0), None
    return (
        Fragment(-1, first_row, head, r) if head else None,
        (first_row + (head > 0), last_row),
        Fragment(-1, last_row, 0, tail) if tail else None,
    )


def cut_rows(factors: Sequence[Factor], spans: Sequence[Span]) -> list[Fragment]:
    """All partial rows among the spans of one rank, in order."""
    found = []
    for k, (factor, span) in enumerate(zip(factors, spans, strict=True)):
        head, _, tail = cut(factor, span)
        found += [fragment._replace(factor=k) for fragment in (head, tail) if fragment is not None]
    return found
