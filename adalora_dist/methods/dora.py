"""DoRA (arXiv 2402.09353): LoRA for the directions of a weight's rows, and their lengths on their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import nn

from adalora_dist.config.methods.dora import DoraConfig
from adalora_dist.methods.adapter import lora_start
from adalora_dist.methods.magnitude import MagnitudeLinear, MagnitudeStep, MagnitudeUpdate
from adalora_dist.methods.protocol import Adapter, Method, Step, adapters_of
from adalora_dist.methods.sites import find_targets, put_around, target_shapes
from adalora_dist.methods.sizes import Sizes, of_ranks
from adalora_dist.methods.update import Matrix


class DoraLinear(MagnitudeLinear):
    """Parameters beside dm: P (d_out, r), LoRA's B, 0 at the start; Qt (d_in, r), its A transposed."""

    def __init__(self, base: nn.Module, name: str, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base, name, rank, scale, dropout)
        self.P, self.Qt = self.vector(self.d_out, rank), self.vector(self.d_in, rank)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """LoRA's start, drawn on the CPU: A ~ U(-a, a), a = 1/sqrt(d_in)."""
        self.Qt.copy_(lora_start(self.Qt.shape, self.d_in, generator))

    def branch(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens @ self.Qt.to(tokens.dtype), self.scale * self.P

    def inner(self) -> torch.Tensor:
        return self.Qt.T


@dataclass(frozen=True)
class DoraUpdate(MagnitudeUpdate):
    """P (d_out, r) and Q (r, d_in)."""

    P: torch.Tensor
    Q: torch.Tensor

    method: ClassVar[str] = "dora"

    def added(self) -> torch.Tensor:
        return self.matrix.scale * (self.P @ self.Q)

    @classmethod
    def shapes(cls, matrix: Matrix, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        (d_out, d_in), r = matrix.shape, matrix.rank
        return {"P": (d_out, r), "Q": (r, d_in), "dm": (d_out,)}


class Dora(Method):
    """W = diag(m) V / |V|, V = W0 + s B A, s = alpha / init_rank (rsLoRA: alpha / sqrt(init_rank))."""

    config: DoraConfig
    update = DoraUpdate
    said = "Adapters of directions and lengths (DoRA, [arXiv 2402.09353](https://arxiv.org/abs/2402.09353))"

    def adapt(self, model: nn.Module, generator: torch.Generator) -> list[Adapter]:
        config = self.config
        make = partial(DoraLinear, rank=config.init_rank, scale=config.scale, dropout=config.dropout)
        layers = put_around(model, find_targets(model, config.targets), make)
        for layer in layers:
            layer.reset(generator)
        return list(layers)

    def sizes(self, model: nn.Module) -> Sizes:
        shapes = target_shapes(model, self.config.targets)
        return of_ranks(shapes, sum(d_in + d_out for d_in, d_out in shapes), sum(d_out for _, d_out in shapes))

    def undecayed(self, model: nn.Module) -> list[torch.Tensor]:
        return [cast(DoraLinear, layer).dm for layer in adapters_of(model)]

    def step(self, adapters: Sequence[Adapter], total_steps: int) -> Step:
        return MagnitudeStep(cast(Sequence[DoraLinear], adapters))

    @classmethod
    def layer_of(cls, base: nn.Module, update: DoraUpdate) -> DoraLinear:
        return DoraLinear(base, update.name, update.rank, update.matrix.scale)
