"""LoRA-FA's projected form: the gradient of B becomes the one whose step follows full fine-tuning best.

g <- g (A A^T + 1e-8 I)^-1 / s^2, before AdamW sees it: as A stands still, the best match of W0's own gradient.
The r x r matrix is made once. A product with the rows of g is local, but for rows that are cut between ranks (ZeRO):
their parts travel in the sum that every step makes anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from adalora_dist.io.errors import UserError
from adalora_dist.methods.branch import BranchLinear, BranchStep
from adalora_dist.sharding.base import ShardEngine, spans_of_ranks
from adalora_dist.sharding.spans import Factor, Fragment, Span, cut, cut_rows

_DAMPING = 1e-8


class _Rows(NamedTuple):
    """What this rank holds of one parameter: whole rows [first, stop) of its span, and fragments with their places."""

    body: slice
    """Elements of the local span."""
    fragments: list[tuple[Fragment, slice, int]]
    """Each with its elements of the local span, and where its row lies in the common vector."""


class ProjectedStep(BranchStep):
    """
    Args:
        layers: whose parameter is B, (d_out, r).
        factors: A (r, d_in) of each.
    """

    def __init__(self, layers: Sequence[BranchLinear], factors: Sequence[torch.Tensor]) -> None:
        super().__init__(layers)
        self._inverses = []
        for layer, a in zip(layers, factors, strict=True):
            gram = a.double() @ a.double().T
            damped = gram + _DAMPING * torch.eye(len(gram), dtype=gram.dtype)
            self._inverses.append((torch.linalg.inv(damped) / layer.scale**2).float())
        self._engine: ShardEngine | None = None
        self._rows: list[_Rows] = []

    @property
    def engine(self) -> ShardEngine:
        assert self._engine is not None
        return self._engine

    def bind(self, engine: ShardEngine) -> torch.Tensor:
        """
        Raises:
            UserError: the engine steps what is cut in several firings, so that no sum has all of it.
        """
        self._engine = engine
        device, spans = engine.values()[0].device, engine.spans()
        self._inverses = [inverse.to(device) for inverse in self._inverses]
        factors = [Factor("P", layer.d_out, layer.rank, 0) for layer in self.layers]
        places, size = {}, 0
        for key in sorted({(f.factor, f.row) for held in spans_of_ranks(engine) for f in cut_rows(factors, held)}):
            places[key], size = size, size + factors[key[0]].rank
        if places and engine.num_firings > 1:
            raise UserError(
                "projected=True: ZeRO steps the parameters in several groups, and rows that are cut between processes "
                "are needed whole at the first: use one parameter group (no lr ratio), or FSDP2"
            )
        self._rows = [self._split(k, factors[k], span, places) for k, span in enumerate(spans)]
        self._partials = torch.zeros(size + 1, dtype=torch.float32, device=device)
        return self._partials

    @staticmethod
    def _split(k: int, factor: Factor, span: Span, places: dict[tuple[int, int], int]) -> _Rows:
        head, (first, last), tail = cut(factor, span)
        rank, begin = factor.rank, span.start
        fragments = []
        for fragment in (f._replace(factor=k) for f in (head, tail) if f is not None):
            start = fragment.row * rank + fragment.start - begin
            held = slice(start, start + fragment.stop - fragment.start)
            fragments.append((fragment, held, places[k, fragment.row]))
        body = slice(first * rank - begin, last * rank - begin) if last > first else slice(0, 0)
        return _Rows(body, fragments)

    def sums(self, step: int) -> None:
        self._partials[:-1].zero_()
        if self._partials.numel() == 1:
            return
        for rows, gradient in zip(self._rows, self.engine.gradients(), strict=True):
            for fragment, held, place in rows.fragments:
                assert gradient is not None  # there is one firing
                columns = slice(place + fragment.start, place + fragment.stop)
                self._partials[columns] = gradient.view(-1)[held]

    def before(self, is_last: bool) -> None:
        for layer, rows, inverse, gradient in zip(
            self.layers, self._rows, self._inverses, self.engine.gradients(), strict=True
        ):
            if gradient is None:
                continue
            flat = gradient.view(-1)
            body = flat[rows.body].view(-1, layer.rank)
            body.copy_(body.float() @ inverse)
            for fragment, held, place in rows.fragments:
                whole = self._partials[place : place + layer.rank] @ inverse
                flat[held] = whole[fragment.start : fragment.stop].to(flat.dtype)
