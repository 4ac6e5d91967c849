"""VeRA (arXiv 2310.11454): W = W0 + diag(b) B diag(d) A, with one random pair A, B for all matrices, and b, d trained.

A (r, largest d_in) and B (largest d_out, r) are drawn as PEFT draws them, number for number; a smaller matrix uses
their first columns and rows. Nothing stores them: they come from the seed, and a digest says whether they are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from adalora_dist.backbones.linears import linear_shape
from adalora_dist.config.methods.vera import SharedConfig, VeraConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.branch import BranchLinear, BranchStep, Drawn, add_product
from adalora_dist.methods.protocol import Adapter, Method, Step, adapters_of
from adalora_dist.methods.sites import find_targets, put_around, target_shapes
from adalora_dist.methods.sizes import Sizes, of_ranks
from adalora_dist.methods.update import AdapterWeights, Matrix, OfMatrix, Update


def projections(seed: int, rank: int, shapes: Iterable[tuple[int, int]], digest: str | None = None) -> Drawn:
    """A (r, largest d_in), then B (largest d_out, r), from one generator.

    Args:
        shapes: (d_out, d_in) of every adapted matrix.
        digest: of those that were trained with.
    """
    rows, columns = zip(*shapes, strict=True)
    return Drawn(partial(_draw, seed, rank, max(columns), max(rows)), "the random projections of VeRA", digest)


def _draw(seed: int, rank: int, d_in: int, d_out: int) -> tuple[torch.Tensor, ...]:
    """U(-a, a) with a = sqrt(6 / columns), computed in PEFT's order so that every bit is PEFT's."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for rows, columns in ((rank, d_in), (d_out, rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
        drawn.append(torch.empty(rows, columns).uniform_(-bound, bound, generator=generator))
    return tuple(drawn)


class VeraLinear(BranchLinear):
    """VeRA's adapter, and with the lengths of a :class:`MagnitudeLinear` DVoRA's.

    Parameters:
        d: (r,), ``d_initial`` at the start.
        b: (d_out,), 0 at the start.

    Args:
        shared: :func:`projections`, drawn from ``seed``.
    """

    def __init__(
        self, base: nn.Module, name: str, shared: Drawn, rank: int, seed: int, d_initial: float, dropout: float = 0.0
    ) -> None:
        super().__init__(base, name, rank, dropout=dropout)
        self.shared, self.seed = shared, seed
        self.d, self.b = self.vector(rank, value=d_initial), self.vector(self.d_out)

    def part(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, d_in) and B (d_out, r) of this matrix."""
        a, b = self.shared.like(like)
        return a[:, : self.d_in], b[: self.d_out]

    def branch(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A x and B, without the vectors, which :meth:`onto` puts in."""
        a, b = self.part(tokens)
        return tokens @ a.T, b

    def onto(self, y: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, in_place: bool = False) -> torch.Tensor:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a compiler keeps what it likes
            given = (y, hidden.to(y.dtype), self.d, self.b, weight, in_place and not y._is_view())
            added: torch.Tensor = _AddBetweenVectors.apply(*given)  # type: ignore[no-untyped-call]
            return added
        return add_product(y, hidden * self.d.to(hidden.dtype), self.b.unsqueeze(1) * weight, in_place)

    def description(self) -> dict[str, Any]:
        return super().description() | {"seed": self.seed, "sha256": self.shared.digest()}


class _AddBetweenVectors(torch.autograd.Function):
    """y + h diag(d) (diag(b) B)^T, of h = A x (tokens, r), d (r,), b (d_out,) and B (d_out, r).

    Of all that, h is what is kept for backward and was not there anyway: r numbers per token. Autograd by itself would
    keep h diag(d) and diag(b) B besides.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        h: torch.Tensor,
        d: torch.Tensor,
        b: torch.Tensor,
        shared: torch.Tensor,
        in_place: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(h, d, b, shared)
        if in_place:
            ctx.mark_dirty(y)
        with torch.autocast(y.device.type, enabled=False):
            return add_product(y, h * d.to(h.dtype), b.unsqueeze(1) * shared, in_place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        h, d, b, shared = ctx.saved_tensors
        of_h = of_d = of_b = None
        with torch.autocast(gradient.device.type, enabled=False):
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                of_product = gradient @ (b.unsqueeze(1) * shared).to(gradient.dtype)
                of_h = of_product * d.to(h.dtype)
                of_d = (of_product * h).sum(dim=0).to(d.dtype)
            if ctx.needs_input_grad[3]:
                of_b = ((gradient.T @ h).to(d.dtype) * shared.to(d.dtype)) @ d
        return gradient, of_h, of_d, of_b, None, None


class SharedUpdate(OfMatrix):
    """What the updates of VeRA and DVoRA have in common: the projections, and vectors of each matrix."""

    shared: Drawn
    seed: int

    vectors: ClassVar[tuple[str, ...]]
    """Kinds of trained vectors: d has r numbers, the others d_out."""

    def settings(self) -> dict[str, Any]:
        return {"seed": self.seed, "sha256": self.shared.digest(), "torch": torch.__version__}

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """diag(b) B (d_out, r) and A (r, d_in) of this matrix."""
        vector, (d_out, d_in) = self.tensors()["b"], self.matrix.shape
        a, b = self.shared.like(vector)
        return vector.unsqueeze(1) * b[:d_out], a[:, :d_in]

    @classmethod
    def shapes(cls, matrix: Matrix, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return {kind: (matrix.rank if kind == "d" else matrix.shape[0],) for kind in cls.vectors}

    @classmethod
    def read(
        cls, matrices: Sequence[Matrix], tensors: Mapping[str, Mapping[str, torch.Tensor]], settings: Mapping[str, Any]
    ) -> list[Update]:
        """They share one pair of projections, drawn again when they are first asked for.

        Raises:
            UserError: the settings name no seed and digest, or ranks differ.
        """
        seed, digest = settings.get("seed"), settings.get("sha256")
        if type(seed) is not int or not 0 <= seed < 2**63 or not isinstance(digest, str):
            raise UserError("adapter.json: settings must hold seed, an integer >= 0, and sha256, text: copy it again")
        if len(ranks := {matrix.rank for matrix in matrices}) > 1:
            raise UserError(f"adapter.json: matrices that share projections have ranks {sorted(ranks)}: copy it again")
        if not matrices:
            return []
        shared = projections(seed, matrices[0].rank, [matrix.shape for matrix in matrices], digest)
        make = cast(Callable[..., Update], cls)
        return [make(matrix=matrix, shared=shared, seed=seed, **tensors[matrix.name]) for matrix in matrices]


@dataclass(frozen=True)
class VeraUpdate(SharedUpdate):
    """d (r,) and b (d_out,)."""

    matrix: Matrix
    shared: Drawn
    seed: int
    d: torch.Tensor
    b: torch.Tensor

    method: ClassVar[str] = "vera"
    formula: ClassVar[str] = "W = W0 + diag(b) B diag(d) A, A and B drawn as PEFT's VeRA draws them"
    vectors = ("d", "b")

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        return self._lora(*self.factors()).add_to(weight)

    def as_lora(self) -> AdapterWeights:
        """Exact, of rank r, with an A of its own: files hold no memory that tensors share."""
        p, a = self.factors()
        return self._lora(p, a.clone())

    def _lora(self, p: torch.Tensor, a: torch.Tensor) -> AdapterWeights:
        return AdapterWeights(self.name, p, self.d, a, 1.0, self.matrix.is_transposed)


class SharedMethod(Method):
    """VeRA, and DVoRA. All that is trained are vectors, so nothing of it is decayed."""

    config: SharedConfig
    layer: ClassVar[type[VeraLinear]] = VeraLinear
    update: ClassVar[Any] = VeraUpdate

    def adapt(self, model: nn.Module, generator: torch.Generator) -> list[Adapter]:
        config = self.config
        names = find_targets(model, config.targets)
        shapes = [linear_shape(model.get_submodule(name)) or (0, 0) for name in names]
        shared = projections(config.projection_seed, config.init_rank, [shape[::-1] for shape in shapes])

        def make(base: nn.Module, name: str) -> VeraLinear:
            sizes = (config.init_rank, config.projection_seed, config.d_initial, config.dropout)
            return self.layer(base, name, shared, *sizes)

        return list(put_around(model, names, make))

    def sizes(self, model: nn.Module) -> Sizes:
        """One rank more is one number per matrix: all else is vectors of d_out numbers."""
        shapes = target_shapes(model, self.config.targets)
        num_vectors = sum(kind != "d" for kind in self.update.vectors)
        return of_ranks(shapes, len(shapes), num_vectors * sum(d_out for _, d_out in shapes))

    def undecayed(self, model: nn.Module) -> list[torch.Tensor]:
        return [p for layer in adapters_of(model) for p in layer.parameters(recurse=False)]

    @classmethod
    def layer_of(cls, base: nn.Module, update: Any) -> VeraLinear:
        return cls.layer(base, update.name, update.shared, update.rank, update.seed, 0.0)


class Vera(SharedMethod):
    """W = W0 + diag(b) B diag(d) A."""

    config: VeraConfig
    said = "Vectors around shared random projections (VeRA, [arXiv 2310.11454](https://arxiv.org/abs/2310.11454))"

    def step(self, adapters: Sequence[Adapter], total_steps: int) -> Step:
        return BranchStep(cast(Sequence[VeraLinear], adapters))
