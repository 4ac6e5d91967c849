"""DyLoRA (arXiv 2210.07558): LoRA whose first b rows and columns work alone, for every b up to the largest rank.

At each step one b is drawn for the whole model, uniformly: W = W0 + (alpha / b) B[:, :b] A[:b]. b follows from the seed
and the number of the step, so there is nothing to send and nothing to save. Columns above b are multiplied by 0 instead
of being cut off: then all steps compute in the same shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from adalora_dist.config.methods.dylora import DyloraConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adapter import lora_start
from adalora_dist.methods.branch import BranchLinear, BranchStep, drawn_number, drawn_seed
from adalora_dist.methods.protocol import Adapter, Method, Step
from adalora_dist.methods.sites import find_targets, put_around, target_shapes
from adalora_dist.methods.sizes import Sizes, of_ranks
from adalora_dist.methods.update import AdapterWeights, Matrix, OfMatrix, Update
from adalora_dist.sharding.base import ShardEngine, State


class Ranks:
    """The rank that the layers of a model have now: one object for all of them. Neither parameter nor buffer.

    Args:
        largest: number of columns of every layer.
        smallest: that may be drawn.
        alpha: of which column i of b gets alpha / b.
    """

    def __init__(self, largest: int, smallest: int, alpha: float, seed: int) -> None:
        self.largest, self.smallest, self.alpha, self.seed = largest, smallest, alpha, seed
        self.now = largest
        """b of this step; columns beyond it are multiplied by 0."""
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def draw(self, step: int) -> None:
        """Take the rank of ``step``."""
        self.now = drawn_number(self.seed, step, self.smallest, self.largest)
        for factors, is_last in self._copies.values():  # in place: what was compiled goes on reading these tensors
            factors.copy_(self._factors(self.now))
            is_last.copy_(torch.arange(self.largest) == self.now - 1)

    def factors(self, like: torch.Tensor, training: bool) -> torch.Tensor:
        """alpha / b for the first b columns, 0 for the others, (r,), in the type of ``like``; outside of training b is
        the largest rank."""
        if not training:
            return torch.full((self.largest,), self.alpha / self.largest, dtype=like.dtype, device=like.device)
        return self._on(like)[0]

    def is_last(self, like: torch.Tensor) -> torch.Tensor:
        """(r,) bool: column b alone."""
        return self._on(like)[1]

    def _factors(self, rank: int) -> torch.Tensor:
        return (torch.arange(self.largest) < rank).double() * (self.alpha / rank)

    def _on(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = like.device, like.dtype
        if key not in self._copies:
            is_last = torch.arange(self.largest) == self.now - 1
            self._copies[key] = self._factors(self.now).to(*key), is_last.to(like.device)
        return self._copies[key]


class DyloraLinear(BranchLinear):
    """Parameters: P (d_out, r), LoRA's B, 0 at the start; Qt (d_in, r), its A transposed.

    Args:
        frozen: whether gradients reach column b alone.
    """

    def __init__(self, base: nn.Module, name: str, ranks: Ranks, frozen: bool = False, dropout: float = 0.0) -> None:
        super().__init__(base, name, ranks.largest, ranks.alpha / ranks.largest, dropout)
        self.ranks, self.frozen = ranks, frozen
        self.P, self.Qt = self.vector(self.d_out, self.rank), self.vector(self.d_in, self.rank)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """LoRA's start, drawn on the CPU: A ~ U(-a, a), a = 1/sqrt(d_in)."""
        self.Qt.copy_(lora_start(self.Qt.shape, self.d_in, generator))

    def branch(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p, qt = cast(torch.Tensor, self.P), cast(torch.Tensor, self.Qt)
        if self.frozen and self.training:
            p, qt = (torch.where(self.ranks.is_last(m), m, m.detach()) for m in (p, qt))
        return tokens @ qt.to(tokens.dtype), p * self.ranks.factors(p, self.training)

    def description(self) -> dict[str, Any]:
        return super().description() | {"min_rank": self.ranks.smallest, "seed": self.ranks.seed}


class DyloraStep(BranchStep):
    """Draws the rank of every step; with ``holds`` all columns but the drawn one stand still, moments included."""

    def __init__(self, layers: Sequence[DyloraLinear], holds: bool) -> None:
        super().__init__(layers)
        self._ranks, self._holds = layers[0].ranks, holds
        self._engine: ShardEngine | None = None
        self._before: tuple[list[torch.Tensor], list[State]] | None = None

    def bind(self, engine: ShardEngine) -> torch.Tensor:
        self._engine = engine
        return super().bind(engine)

    def begin(self, step: int) -> None:
        self._ranks.draw(step)

    def before(self, is_last: bool) -> None:
        if self._holds and self._before is None:  # in the first firing of a step
            assert self._engine is not None
            values = [value.clone() for value in self._engine.values()]
            states = [{kind: held.clone() for kind, held in state.items()} for state in self._engine.states()]
            self._before = values, states

    def after(self, step: int) -> None:
        if self._before is None:
            return
        assert self._engine is not None
        (values, states), self._before = self._before, None
        written = []
        now = zip(self._engine.spans(), self._engine.values(), self._engine.states(), strict=True)
        for (span, value, state), old, old_state in zip(now, values, states, strict=True):
            columns = torch.arange(span.start, span.stop, device=value.device) % self._ranks.largest
            is_drawn = (columns == self._ranks.now - 1).view_as(value)
            written.append(torch.where(is_drawn, value, old))
            for kind in (kind for kind in state if kind != "step"):
                held, mask = state[kind], is_drawn.view_as(state[kind])
                kept = old_state[kind] if kind in old_state else torch.zeros_like(held)
                held.copy_(torch.where(mask, held, kept))
        self._engine.write(range(len(written)), written)

    def record(self, step: int) -> dict[str, float]:
        ranks = self._ranks
        return {"drawn_rank": drawn_number(ranks.seed, step, ranks.smallest, ranks.largest)}


@dataclass(frozen=True)
class DyloraUpdate(OfMatrix):
    """P (d_out, r) and Q (r, d_in), of which the first b columns and rows are an adapter of their own."""

    matrix: Matrix
    P: torch.Tensor
    Q: torch.Tensor

    method: ClassVar[str] = "dylora"
    formula: ClassVar[str] = "W = W0 + scale * (rank / b) * P[:, :b] Q[:b] for every b up to rank"

    def at_rank(self, rank: int) -> DyloraUpdate:
        """The adapter of the first ``rank`` columns and rows, with a scale of its own."""
        matrix = self.matrix._replace(rank=rank, scale=self.matrix.scale * self.rank / rank)
        return DyloraUpdate(matrix, self.P[:, :rank].contiguous(), self.Q[:rank].contiguous())

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        return self.as_lora().add_to(weight)

    def as_lora(self) -> AdapterWeights:
        """Exact, at its largest rank."""
        lam, matrix = torch.ones(self.rank), self.matrix
        return AdapterWeights(self.name, self.P, lam, self.Q, matrix.scale, matrix.is_transposed)

    @classmethod
    def shapes(cls, matrix: Matrix, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        d_out, d_in = matrix.shape
        return {"P": (d_out, matrix.rank), "Q": (matrix.rank, d_in)}


def at_rank(updates: Sequence[Update], rank: int) -> list[Update]:
    """DyLoRA's adapters at one of their ranks.

    Raises:
        UserError: they are another method's, or were not trained at so high a rank.
    """
    found: list[Update] = []
    for update in updates:
        if not isinstance(update, DyloraUpdate):
            raise UserError(
                f"--rank {rank}: these adapters were trained for one rank each, not for all (that is method dylora): "
                f"use --max-rank {rank} --fold, which cuts them by truncated SVD"
            )
        if not 1 <= rank <= update.rank:
            raise UserError(f"--rank {rank}: must be from 1 to {update.rank}, the largest rank that was trained")
        found.append(update.at_rank(rank))
    return found


class Dylora(Method):
    """W = W0 + (alpha / b) B[:, :b] A[:b] with another b in every step."""

    config: DyloraConfig
    update = DyloraUpdate
    said = "Low-rank adapters for many ranks (DyLoRA, [arXiv 2210.07558](https://arxiv.org/abs/2210.07558))"

    def adapt(self, model: nn.Module, generator: torch.Generator) -> list[Adapter]:
        config, seed = self.config, drawn_seed(generator)
        ranks = Ranks(config.init_rank, config.min_rank, config.alpha, seed)

        def make(base: nn.Module, name: str) -> DyloraLinear:
            return DyloraLinear(base, name, ranks, config.frozen != "no", config.dropout)

        layers = put_around(model, find_targets(model, config.targets), make)
        for layer in layers:
            layer.reset(generator)
        return list(layers)

    def sizes(self, model: nn.Module) -> Sizes:
        """By its largest rank, all of which is trained."""
        shapes = target_shapes(model, self.config.targets)
        return of_ranks(shapes, sum(d_in + d_out for d_in, d_out in shapes), smallest=self.config.min_rank)

    def step(self, adapters: Sequence[Adapter], total_steps: int) -> Step:
        return DyloraStep(cast(Sequence[DyloraLinear], adapters), self.config.frozen == "algorithm")

    @classmethod
    def layer_of(cls, base: nn.Module, update: DyloraUpdate) -> DyloraLinear:
        """At the largest rank."""
        return DyloraLinear(base, update.name, Ranks(update.rank, update.rank, update.matrix.scale * update.rank, 0))
