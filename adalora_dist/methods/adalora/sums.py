"""Sums over a rank's spans: triplet scores, Gram matrices, the regulariser's gradient. Pure; no process group.

What is linear in the elements (scores) is summed per rank and added up over ranks. What is linear in rows (Gram
matrices) is summed over bodies; a row that is cut between ranks is put together first: every rank writes its part
into a common buffer of *split rows*, so one reduction completes Gram matrices and split rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch

from adalora_dist.methods.adalora.orthogonality import OrthogonalityForm, defect, gradient_factor
from adalora_dist.methods.adalora.ragged import RaggedGroups, as_slice, padded_places
from adalora_dist.sharding.layout import FlatBuffer, Portion, SpanLayout
from adalora_dist.sharding.spans import FactorKind, Span, cut_rows


class TripletSums:
    """Sums over one rank's spans, in a constant number of operations.

    Args:
        layout: of this rank's spans.
        spans_of_ranks: every shard rank's spans, this rank's included: what the split rows follow from.
        device: where the index tensors and ``partials`` live.
        dtype: of ``partials`` and of the flat buffers.
        num_matrices: 2n, how many P and Q the mean of the regulariser's ``norm`` form runs over; default: those of
            rank > 0 in the layout.
        num_replicas: how many ranks have the same spans; scores are divided by it, so that all ranks' add up.

    Sizes, for communication budgets: ``num_gram_elements`` and ``num_split_row_elements`` float32 per step.
    """

    partials: torch.Tensor
    """[Gram matrices | split rows | one more element, for the caller]: what a step sums over the shard group."""

    def __init__(
        self,
        layout: SpanLayout,
        spans_of_ranks: Sequence[Sequence[Span]],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        num_matrices: int | None = None,
        num_replicas: int = 1,
    ) -> None:
        self.layout = layout
        self._stacked_in: FlatBuffer | None = None
        self._index_triplets(device, dtype, num_replicas)
        self._index_grams(spans_of_ranks, device)
        self._num_matrices = sum(self._num_of_rank.values()) if num_matrices is None else num_matrices
        self._view_partials(device, dtype)

    def _index_triplets(self, device: torch.device | str, dtype: torch.dtype, num_replicas: int) -> None:
        """Scores: column sums of all bodies, then the fragments' elements, weighted by 1/d (1 for lambda).

        ``_score_index`` says for every triplet which of these it adds up; a last one, always 0, fills the rows up.
        (Gathering gives the same bits every time; scattering with atomic additions would not.)
        """
        columns = [(k, 0, group.rank) for group in self.layout.groups for k in group.factors]
        columns += [(fragment.factor, fragment.start, fragment.stop) for fragment in self.layout.fragments]
        triplets: list[int] = []
        weights: list[float] = []
        kinds: list[FactorKind] = []
        for k, first, stop in columns:
            factor = self.layout.factors[k]
            triplets += range(factor.first_triplet + first, factor.first_triplet + stop)
            weights += [1.0 / factor.rows] * (stop - first)
            kinds += [factor.kind] * (stop - first)
        self._sums = torch.zeros(len(triplets) + 1, dtype=dtype, device=device)  # of one column on this rank
        self._group_sums, start = [], 0
        for group in self.layout.groups:
            size = len(group.factors) * group.rank
            self._group_sums.append(self._sums[start : start + size].view(-1, group.rank))
            start += size
        self._fragment_sums = self._sums[start:-1]
        self._score_weights = torch.tensor([*weights, 0.0], dtype=torch.float64, device=device) / num_replicas
        self._weights_of_kind = {
            kind: self._score_weights * torch.tensor([*(k == kind for k in kinds), False], device=device)
            for kind in get_args(FactorKind)
        }
        sources: list[list[int]] = [[] for _ in range(self.layout.num_triplets)]
        for source, triplet in enumerate(triplets):
            sources[triplet].append(source)
        width = max((len(s) for s in sources), default=0)
        filled = [s + [len(triplets)] * (width - len(s)) for s in sources]
        self._score_index = torch.tensor(filled, dtype=torch.long, device=device).view(self.layout.num_triplets, width)

    def _index_grams(self, spans_of_ranks: Sequence[Sequence[Span]], device: torch.device | str) -> None:
        """Gram matrices and split rows are kept per size r, so that each size is one batch.

        Within it factors of one shape lie side by side, so that a group's matrices usually are one slice. Where any are
        not equally wide (``ragged.py``), a narrower one's last columns are no triplets, and left out.
        """
        layout = self.layout
        padded = [layout.pads(factor.orthogonal, factor.widths) for factor in layout.factors]
        pairs = zip(padded, layout.factors, strict=True)
        self._padded_width = max((max(factor.widths) for is_one, factor in pairs if is_one), default=0)
        self._slot: dict[int, tuple[int, int]] = {}  # factor -> (r, index of its first matrix among those of that r)
        self._num_of_rank: dict[int, int] = {}
        columns: dict[int, list[list[int]]] = {}  # r -> of every matrix the triplets of its columns, -1: none
        shapes = [
            (is_one, f.rows, () if is_one else f.widths) for is_one, f in zip(padded, layout.factors, strict=True)
        ]
        for k, factor in sorted(enumerate(layout.factors), key=lambda item: shapes[item[0]]):
            if factor.orthogonal and factor.rank:
                r, first = self._padded_width if padded[k] else max(factor.widths), factor.first_triplet
                of_r = columns.setdefault(r, [])
                self._slot[k] = r, len(of_r)
                for width in factor.widths:
                    of_r.append([*range(first, first + width), *[-1] * (r - width)])
                    first += width
        self._num_of_rank = {r: len(of_r) for r, of_r in columns.items()}
        self._gram_triplets = {r: torch.tensor(of_r).clamp(min=0).to(device) for r, of_r in columns.items()}
        self._is_triplet = {
            r: (torch.tensor(of_r) >= 0).to(device) if any(-1 in of_one for of_one in of_r) else None
            for r, of_r in columns.items()
        }
        self._index_blocks(device)
        split = {(f.factor, f.row) for spans in spans_of_ranks for f in cut_rows(layout.factors, spans)}
        self.split_rows = sorted((k, row) for k, row in split if k in self._slot)
        position: dict[tuple[int, int], int] = {}
        self._num_split_of_rank = dict.fromkeys(self._num_of_rank, 0)
        split_slots: dict[int, list[int]] = {r: [] for r in self._num_of_rank}
        for key in self.split_rows:
            r, slots = self._slots_of(key[0])
            position[key] = self._num_split_of_rank[r]
            self._num_split_of_rank[r] += len(slots)
            split_slots[r] += slots
        self._split_slots = {r: torch.tensor(of_r, dtype=torch.long, device=device) for r, of_r in split_slots.items()}
        # Per r: fragment elements in the flat buffer, and their places in the (split rows, r) matrix.
        flat_index: dict[int, list[int]] = {r: [] for r in self._num_of_rank}
        row_index: dict[int, list[int]] = {r: [] for r in self._num_of_rank}
        flat = layout.fragments_start
        for f in layout.fragments:
            if f.factor in self._slot:
                r, start = self._slot[f.factor][0], position[f.factor, f.row]
                flat_index[r] += range(flat, flat + f.stop - f.start)
                places = padded_places(layout.factors[f.factor].widths, r)
                row_index[r] += [start * r + place for place in places[f.start : f.stop]]
            flat += f.stop - f.start
        self._split_elements = {
            r: tuple(torch.tensor(index[r], dtype=torch.long, device=device) for index in (flat_index, row_index))
            for r in self._num_of_rank
        }

    def _slots_of(self, k: int) -> tuple[int, list[int]]:
        """The size of a factor's matrices, and which they are among those of that size."""
        r, first = self._slot[k]
        return r, list(range(first, first + len(self.layout.factors[k].widths)))

    def _index_blocks(self, device: torch.device | str) -> None:
        """Of every group that is not padded: its matrices."""
        self._group_slots: list[slice | torch.Tensor | None] = []
        for group in self.layout.groups:
            is_other = not group.orthogonal or self.layout.is_padded(group)
            slots = [] if is_other else [s for k in group.factors for s in self._slots_of(k)[1]]
            self._group_slots.append(as_slice(slots, device) if slots else None)

    def _stack(self, values: FlatBuffer, work: FlatBuffer) -> None:
        """Where factors hold several matrices, copy them to ``work`` one behind the other, or padded to ``_ragged``."""
        if self._stacked_in is not work:
            pairs = zip(work.stacked, values.stacked, strict=True)
            several = [(to.as_if, source.in_place) for to, source in pairs if to is not None and source is not None]
            if several:
                torch._foreach_copy_([to for to, _ in several], [source for _, source in several])
            if (ragged := self._ragged.get(values.portion.start)) is not None:
                ragged.copy(values.data)
        self._stacked_in = work

    def _matrices(self, values: FlatBuffer, k: int, work: FlatBuffer) -> tuple[torch.Tensor, torch.Tensor]:
        """The (matrices, rows, r) of group k, and transposed; a copy where factors hold several (:meth:`_stack`)."""
        if len(self.layout.groups[k].blocks) == 1:
            return values.body(k), values.transposed[k - values.portion.groups.start]
        stacked = work.stacked[k - work.portion.groups.start]
        assert stacked is not None
        return stacked.matrices, stacked.transposed

    def _view_partials(self, device: torch.device | str, dtype: torch.dtype) -> None:
        size = self.num_gram_elements + self.num_split_row_elements + 1
        self.partials = torch.zeros(size, device=device, dtype=dtype)
        self._grams, self._rows, start = {}, {}, 0
        for r, n in self._num_of_rank.items():
            self._grams[r] = self.partials[start : start + n * r * r].view(n, r, r)
            start += n * r * r
        for r, n in self._num_split_of_rank.items():
            self._rows[r] = self.partials[start : start + n * r].view(n, r)
            start += n * r
        self._gram_factors = {r: torch.zeros_like(grams) for r, grams in self._grams.items()}
        self._group_grams, self._group_factors = (
            [
                of_rank[max(group.blocks)][slots] if isinstance(slots, slice) else None
                for group, slots in zip(self.layout.groups, self._group_slots, strict=True)
            ]
            for of_rank in (self._grams, self._gram_factors)
        )
        width = self._padded_width
        self._ragged = {
            portion.start: RaggedGroups(
                self.layout, portion, width, self._slots_of, self._grams[width], self._gram_factors[width]
            )
            for portion in self.layout.portions
            if any(self.layout.is_padded(self.layout.groups[k]) for k in portion.groups)
        }
        # There are no split rows, and this rank holds rows of every matrix.
        covered = sum(ragged.covered() for ragged in self._ragged.values()) * width**2
        self._all_written = covered + sum(g.numel() for g in self._group_grams if g is not None) == size - 1

    @property
    def num_gram_elements(self) -> int:
        return sum(r * r * n for r, n in self._num_of_rank.items())

    @property
    def num_split_row_elements(self) -> int:
        return sum(r * n for r, n in self._num_split_of_rank.items())

    def score_partials(self, elements: FlatBuffer, kind: FactorKind | None = None) -> torch.Tensor:
        """This rank's part of the triplet scores (eq. 7): sums of element scores, (num_triplets,) float64.

        S_i = s(lambda_i) + (1/d_out) sum_j s(P_ji) + (1/d_in) sum_j s(Q_ij), or of these three the one of ``kind``.
        Partials of all ranks add up to S.
        """
        self.add_up(elements)
        return self.summed_scores(kind)

    def add_up(self, elements: FlatBuffer) -> None:
        """Of a portion of element scores what :meth:`summed_scores` puts together when all have been added up."""
        for body, k in zip(elements.bodies, elements.portion.groups, strict=True):
            torch.sum(body, dim=1, out=self._group_sums[k])
        if self.layout.fragments and elements.fragments is not None:
            self._fragment_sums.copy_(elements.fragments)

    def summed_scores(self, kind: FactorKind | None = None) -> torch.Tensor:
        """As :meth:`score_partials`, of what has been added up."""
        weighted = self._sums * (self._score_weights if kind is None else self._weights_of_kind[kind])
        return weighted[self._score_index].sum(dim=1)

    def gram_partials(self, values: FlatBuffer, work: FlatBuffer | None = None) -> torch.Tensor:
        """Write this rank's part of Gram matrices and split rows to ``partials``, all but the last; returns it.

        Of several portions, each writes its own part, the first one first.

        Args:
            work: the same portion of another buffer, whose content is lost. :meth:`times_factors` need not copy values
                once more if it is the next ``out`` there, untouched.
        """
        portion = values.portion
        if work is None:
            work = FlatBuffer(self.layout, None, values.data.device, values.data.dtype, portion)
        self._stacked_in = None
        self._stack(values, work)
        if not self._all_written and portion.start == 0:
            self.partials.zero_()
        for k in portion.groups:
            if (slots := self._group_slots[k]) is None:
                continue
            matrices, transposed = self._matrices(values, k, work)
            if (grams := self._group_grams[k]) is not None:
                torch.bmm(transposed, matrices, out=grams)
            else:
                self._grams[max(self.layout.groups[k].blocks)][slots] = torch.bmm(transposed, matrices)
        if (ragged := self._ragged.get(portion.start)) is not None:
            ragged.write_grams()
        if values.fragments is not None:
            for r, (flat_index, row_index) in self._split_elements.items():
                if len(flat_index):
                    self._rows[r].view(-1)[row_index] = values.data[_within(portion, flat_index)]
        return self.partials

    def _whole_grams(self, r: int) -> torch.Tensor:
        """Gram matrices of the factors of rank r, (n, r, r), from the summed ``partials``: split rows included."""
        slots, rows = self._split_slots[r], self._rows[r]
        return (
            self._grams[r].index_add(0, slots, rows.unsqueeze(2) * rows.unsqueeze(1)) if len(slots) else self._grams[r]
        )

    def mean_defect(self, form: OrthogonalityForm) -> float:
        """How far P and Q were from orthogonal at the start of the last step, from the summed ``partials``.

        The mean over the 2n matrices of the Frobenius norm of X^T X less its diagonal (``directions``), or of
        X^T X - I. Reads from the device.
        """
        total = 0.0
        for r in self._split_slots:
            grams = self._whole_grams(r)
            off = grams - torch.diag_embed(grams.diagonal(dim1=-2, dim2=-1)) if form == "directions" else defect(grams)
            if (real := self._is_triplet[r]) is not None:
                off = off * (real.unsqueeze(-1) & real.unsqueeze(-2))
            total += off.norm(dim=(-2, -1)).sum().item()
        return total / self._num_matrices

    def orthogonality_gradient(
        self,
        values: FlatBuffer,
        form: OrthogonalityForm,
        gamma: float,
        out: FlatBuffer,
        keep: torch.Tensor | None = None,
    ) -> FlatBuffer:
        """Write dR/dw of every local element of P and Q to ``out``, from the summed ``partials``.

        With ``keep``, (num_triplets,) bool, R is about the columns of these triplets alone.
        """
        self.make_factors(form, gamma, keep)
        return self.times_factors(values, out)

    def make_factors(self, form: OrthogonalityForm, gamma: float, keep: torch.Tensor | None = None) -> None:
        """What :meth:`times_factors` multiplies by; arguments as of :meth:`orthogonality_gradient`."""
        for r in self._split_slots:
            grams = self._whole_grams(r)
            active, real = None if keep is None else keep[self._gram_triplets[r]], self._is_triplet[r]
            if real is not None:
                active = real if active is None else active & real
            gradient_factor(grams, form, gamma, self._num_matrices, active, out=self._gram_factors[r])

    def times_factors(self, values: FlatBuffer, out: FlatBuffer) -> FlatBuffer:
        """Write dR/dw of the elements of a portion to ``out``, the same portion of another buffer."""
        self._stack(values, out)
        targets, products = [], []
        for k in values.portion.groups:
            if (slots := self._group_slots[k]) is None:
                continue
            group, of_group = self.layout.groups[k], self._group_factors[k]
            factor = self._gram_factors[max(group.blocks)][slots] if of_group is None else of_group
            matrices, _ = self._matrices(values, k, out)
            if len(group.blocks) == 1:
                torch.bmm(matrices, factor, out=out.body(k))
            elif (target := out.stacked[k - out.portion.groups.start]) is not None:
                targets.append(target.in_place)
                products.append(torch.bmm(matrices, factor).view(target.in_place.shape))
        if targets:
            torch._foreach_copy_(targets, products)
        if (ragged := self._ragged.get(values.portion.start)) is not None:
            ragged.write_products(out.data)
        self._stacked_in = None
        if values.fragments is not None:
            for r, (flat_index, row_index) in self._split_elements.items():
                if len(flat_index):
                    row_gradients = torch.bmm(self._rows[r].unsqueeze(1), self._gram_factors[r][self._split_slots[r]])
                    out.data[_within(values.portion, flat_index)] = row_gradients.flatten()[row_index]
        return out


def _within(portion: Portion, index: torch.Tensor) -> torch.Tensor:
    return index - portion.start if portion.start else index
