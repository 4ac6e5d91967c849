"""How the spans that a rank holds lie in flat buffers, and the sums over them. Pure; no process group.

Every adapter parameter is a row-major matrix of r columns, one per triplet: P (d_out rows), Q^T (d_in rows), and
lambda (1 row). A span of it is a run of whole rows, the *body*, with at most one partial row at either end, the
*fragments* (only flat slices cut rows). Bodies of equal shape lie side by side in the flat buffer, so that a sum or
a product over all of them is one batched operation on a view; fragments lie at the buffer's end.

What is linear in the elements (scores) is summed per rank and added up over ranks. What is linear in rows (Gram
matrices) is summed over bodies; a row that is cut between ranks is put together first: every rank writes its part
into a common buffer of *split rows*, so one reduction completes Gram matrices and split rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from adalora_dist.orthogonality import OrthogonalityForm, gradient_factor


class Span(NamedTuple):
    """Elements [start, stop) of a flattened full tensor; empty when start == stop."""

    start: int
    stop: int


FactorKind = Literal["P", "lam", "Qt"]
FACTOR_KINDS: tuple[FactorKind, ...] = ("P", "lam", "Qt")


@dataclass(frozen=True)
class Factor:
    """One adapter parameter: a (rows, rank) matrix whose columns belong to consecutive triplets."""

    kind: FactorKind
    rows: int
    rank: int
    first_triplet: int

    @property
    def numel(self) -> int:
        return self.rows * self.rank

    @property
    def orthogonal(self) -> bool:
        """Whether the regulariser acts on this parameter."""
        return self.kind != "lam"


class Piece(NamedTuple):
    """A run of elements: where it is in a parameter's local span, and where in the flat buffer."""

    factor: int
    local_start: int
    length: int
    flat_start: int


class Group(NamedTuple):
    """Bodies of one shape, side by side from ``flat_start``: a (len(factors), rows, rank) view."""

    kind: str
    rows: int
    rank: int
    flat_start: int
    factors: tuple[int, ...]


class Fragment(NamedTuple):
    """Part of one row of one parameter: columns [start, stop)."""

    factor: int
    row: int
    start: int
    stop: int


def _cut(factor: Factor, span: Span) -> tuple[Fragment | None, tuple[int, int], Fragment | None]:
    """Head fragment, whole rows [first, last), tail fragment of a span; indices filled in by the caller."""
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
        head, _, tail = _cut(factor, span)
        found += [fragment._replace(factor=k) for fragment in (head, tail) if fragment is not None]
    return found


class SpanLayout:
    """The flat layout of one rank's spans, and sums over it.

    Args:
        factors: all adapter parameters, in the same order on every rank.
        spans: this rank's span of each.
        spans_of_ranks: every shard rank's spans, this rank's included; needed to agree on the split rows. Leave out
            where one rank holds everything.
        device: where the index tensors live.
        num_matrices: 2n, how many P and Q the mean of the regulariser's ``norm`` form runs over; default: those of
            rank > 0 among ``factors``.

    Sizes, for communication budgets: ``num_gram_elements`` and ``num_split_row_elements`` float32 per step.
    """

    def __init__(
        self,
        factors: Sequence[Factor],
        spans: Sequence[Span],
        spans_of_ranks: Sequence[Sequence[Span]] | None = None,
        device: torch.device | str = "cpu",
        num_matrices: int | None = None,
    ) -> None:
        self.factors = tuple(factors)
        self.num_triplets = max((f.first_triplet + f.rank for f in factors), default=0)
        self.pieces: list[Piece] = []
        self.groups: list[Group] = []
        self._place(spans)
        self._index_triplets(device)
        self._index_grams(spans_of_ranks or [spans], device)
        self._num_matrices = sum(self._num_of_rank.values()) if num_matrices is None else num_matrices

    def _place(self, spans: Sequence[Span]) -> None:
        bodies: dict[tuple[str, int, int], list[int]] = {}
        rows_of: dict[int, tuple[int, int]] = {}
        for k, (factor, span) in enumerate(zip(self.factors, spans, strict=True)):
            _, rows, _ = _cut(factor, span)
            if rows[1] > rows[0]:
                rows_of[k] = rows
                bodies.setdefault((factor.kind, rows[1] - rows[0], factor.rank), []).append(k)
        flat = 0
        for (kind, num_rows, rank), members in bodies.items():
            self.groups.append(Group(kind, num_rows, rank, flat, tuple(members)))
            for k in members:
                self.pieces.append(Piece(k, rows_of[k][0] * rank - spans[k].start, num_rows * rank, flat))
                flat += num_rows * rank
        self.fragments_start = flat
        self.fragments = cut_rows(self.factors, spans)
        for fragment in self.fragments:
            start = fragment.row * self.factors[fragment.factor].rank + fragment.start - spans[fragment.factor].start
            length = fragment.stop - fragment.start
            self.pieces.append(Piece(fragment.factor, start, length, flat))
            flat += length
        self.num_elements = flat

    def _index_triplets(self, device: torch.device | str) -> None:
        """Where group sums and fragment elements go in the score vector, and their weights (1/d; 1 for lambda)."""
        self._group_triplets, self._group_weights = [], []
        for group in self.groups:
            firsts = torch.tensor([self.factors[k].first_triplet for k in group.factors])
            self._group_triplets.append((firsts[:, None] + torch.arange(group.rank)).flatten().to(device))
            weights = torch.tensor([1.0 / self.factors[k].rows for k in group.factors], dtype=torch.float64)
            self._group_weights.append(weights[:, None].to(device))
        triplets, element_weights = [], []
        for fragment in self.fragments:
            factor = self.factors[fragment.factor]
            triplets += [factor.first_triplet + column for column in range(fragment.start, fragment.stop)]
            element_weights += [1.0 / factor.rows] * (fragment.stop - fragment.start)
        self._fragment_triplets = torch.tensor(triplets, dtype=torch.long, device=device)
        self._fragment_weights = torch.tensor(element_weights, dtype=torch.float64, device=device)

    def _index_grams(self, spans_of_ranks: Sequence[Sequence[Span]], device: torch.device | str) -> None:
        """Gram matrices and split rows are kept per rank size r, so that each size is one batch."""
        self._slot: dict[int, tuple[int, int]] = {}  # factor -> (r, index among the factors of that r)
        self._num_of_rank: dict[int, int] = {}
        for k, factor in enumerate(self.factors):
            if factor.orthogonal and factor.rank:
                index = self._num_of_rank.get(factor.rank, 0)
                self._slot[k] = (factor.rank, index)
                self._num_of_rank[factor.rank] = index + 1
        firsts: dict[int, list[int]] = {r: [] for r in self._num_of_rank}
        for k, (r, _) in self._slot.items():
            firsts[r].append(self.factors[k].first_triplet)
        self._gram_triplets = {  # (matrices, r): the triplet of each column
            r: (torch.tensor(first)[:, None] + torch.arange(r)).to(device) for r, first in firsts.items()
        }
        split = {(f.factor, f.row) for spans in spans_of_ranks for f in cut_rows(self.factors, spans)}
        self.split_rows = sorted((k, row) for k, row in split if k in self._slot)
        position: dict[tuple[int, int], int] = {}
        count: dict[int, int] = {}
        for key in self.split_rows:
            r = self.factors[key[0]].rank
            position[key] = count.get(r, 0)
            count[r] = position[key] + 1
        self._num_split_of_rank = {r: count.get(r, 0) for r in self._num_of_rank}
        self._group_slots = [
            torch.tensor([self._slot[k][1] for k in g.factors], device=device) if g.kind != "lam" else None
            for g in self.groups
        ]
        self._split_slots = {
            r: torch.tensor(
                [self._slot[k][1] for k, _ in self.split_rows if self.factors[k].rank == r],
                dtype=torch.long,
                device=device,
            )
            for r in self._num_of_rank
        }
        # Per r: fragment elements in the flat buffer, and their places in the (split rows, r) matrix.
        self._split_elements: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for r in self._num_of_rank:
            flat_index: list[int] = []
            row_index: list[int] = []
            flat = self.fragments_start
            for f in self.fragments:
                if f.factor in self._slot and self.factors[f.factor].rank == r:
                    flat_index += range(flat, flat + f.stop - f.start)
                    start = position[f.factor, f.row] * r
                    row_index += range(start + f.start, start + f.stop)
                flat += f.stop - f.start
            self._split_elements[r] = (
                torch.tensor(flat_index, dtype=torch.long, device=device),
                torch.tensor(row_index, dtype=torch.long, device=device),
            )

    @property
    def num_gram_elements(self) -> int:
        return sum(r * r * n for r, n in self._num_of_rank.items())

    @property
    def num_split_row_elements(self) -> int:
        return sum(r * n for r, n in self._num_split_of_rank.items())

    def views(self, locals_: Sequence[torch.Tensor | None], flat: torch.Tensor) -> tuple[list, list]:
        """Matching views of local spans and of ``flat``, leaving out parameters given as None."""
        chosen = [(p, local) for p in self.pieces if (local := locals_[p.factor]) is not None]
        return (
            [local.narrow(0, p.local_start, p.length) for p, local in chosen],
            [flat.narrow(0, p.flat_start, p.length) for p, _ in chosen],
        )

    def collect(self, locals_: Sequence[torch.Tensor | None], flat: torch.Tensor) -> torch.Tensor:
        """Copy local spans into their places in ``flat``; returns ``flat``."""
        local, views = self.views(locals_, flat)
        if local:
            torch._foreach_copy_(views, local)
        return flat

    def score_partials(self, elements: torch.Tensor) -> torch.Tensor:
        """This rank's part of the triplet scores (eq. 7): sums of element scores, (num_triplets,) float64.

        S_i = s(lambda_i) + (1/d_out) sum_j s(P_ji) + (1/d_in) sum_j s(Q_ij). Partials of all ranks add up to S.
        """
        scores = torch.zeros(self.num_triplets, dtype=torch.float64, device=elements.device)
        for group, triplets, weights in zip(self.groups, self._group_triplets, self._group_weights, strict=True):
            sums = self._body(group, elements).sum(dim=1, dtype=torch.float64)
            scores.index_add_(0, triplets, (sums * weights).flatten())
        fragments = elements[self.fragments_start :].double() * self._fragment_weights
        return scores.index_add_(0, self._fragment_triplets, fragments)

    def gram_partials(self, values: torch.Tensor) -> torch.Tensor:
        """This rank's part of [Gram matrices | split rows], a float32 vector to be summed over the shard group."""
        grams = {r: values.new_zeros(n, r, r) for r, n in self._num_of_rank.items()}
        rows = {r: values.new_zeros(n * r) for r, n in self._num_split_of_rank.items()}
        for group, slots in zip(self.groups, self._group_slots, strict=True):
            if slots is not None:
                x = self._body(group, values)
                grams[group.rank][slots] = torch.bmm(x.transpose(1, 2), x)
        for r, (flat_index, row_index) in self._split_elements.items():
            rows[r][row_index] = values[flat_index]
        return torch.cat([t.flatten() for t in (*grams.values(), *rows.values())]) if grams else values.new_zeros(0)

    def orthogonality_gradient(
        self,
        values: torch.Tensor,
        reduced: torch.Tensor,
        form: OrthogonalityForm,
        gamma: float,
        keep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """dR/dw for every local element, from the summed :meth:`gram_partials`; 0 for lambda.

        With ``keep``, (num_triplets,) bool, R is about the columns of these triplets alone.
        """
        gradient = torch.zeros_like(values)
        grams, rows, start = {}, {}, 0
        for r, n in self._num_of_rank.items():
            grams[r] = reduced[start : start + n * r * r].view(n, r, r)
            start += n * r * r
        for r, n in self._num_split_of_rank.items():
            rows[r] = reduced[start : start + n * r].view(n, r)
            start += n * r
        factors = {}
        for r, slots in self._split_slots.items():
            complete = grams[r].index_add(0, slots, rows[r].unsqueeze(2) * rows[r].unsqueeze(1))
            active = None if keep is None else keep[self._gram_triplets[r]]
            factors[r] = gradient_factor(complete, form, gamma, self._num_matrices, active)
            flat_index, row_index = self._split_elements[r]
            row_gradients = torch.bmm(rows[r].unsqueeze(1), factors[r][slots])
            gradient[flat_index] = row_gradients.flatten()[row_index]
        for group, group_slots in zip(self.groups, self._group_slots, strict=True):
            if group_slots is not None:
                torch.bmm(self._body(group, values), factors[group.rank][group_slots], out=self._body(group, gradient))
        return gradient

    @staticmethod
    def _body(group: Group, flat: torch.Tensor) -> torch.Tensor:
        num = len(group.factors)
        stop = group.flat_start + num * group.rows * group.rank
        return flat[group.flat_start : stop].view(num, group.rows, group.rank)
