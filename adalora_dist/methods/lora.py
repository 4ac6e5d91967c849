"""Plain LoRA (arXiv 2106.09685): AdaLoRA's triplets with lambda fixed at 1, so that B = P, A = Q, and no budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from adalora_dist.methods.adalora.layers import TripletLayer, ranks_of
from adalora_dist.methods.adalora.method import TripletMethod
from adalora_dist.methods.adalora.start import Triplets, with_lambda_in_p
from adalora_dist.methods.protocol import Adapter, Step
from adalora_dist.methods.sites import site_shapes
from adalora_dist.methods.sizes import Sizes, of_ranks


class LoraStep(Step):
    """Ranks stay. After a step, layers give up the products that they made of the old P."""

    def __init__(self, layers: Sequence[TripletLayer]) -> None:
        super().__init__(layers)
        self.layers = list(layers)

    def after(self, step: int) -> None:
        self.layers[0].lambdas.release()

    def rank_pattern(self) -> dict[str, int]:
        return ranks_of(self.layers)

    def facts(self) -> dict[str, Any]:
        total = sum(self.rank_pattern().values())
        return super().facts() | {"initial_budget": total, "target_budget": total}


class Lora(TripletMethod):
    """W = W0 + s B A, s = alpha / init_rank (rsLoRA: alpha / sqrt(init_rank))."""

    said = "Low-rank adapters (LoRA, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685))"

    def reset(self, layer: TripletLayer, generator: torch.Generator) -> None:
        layer.reset_as_lora(generator)

    def begin(self, lam: nn.Parameter) -> None:
        lam.requires_grad_(False).fill_(1.0)

    def given(self, triplets: Triplets) -> Triplets:
        return with_lambda_in_p(triplets)

    def sizes(self, model: nn.Module) -> Sizes:
        shapes = site_shapes(model, self.config)
        return of_ranks(shapes, sum(d_in + d_out for d_in, d_out in shapes))

    def step(self, adapters: Sequence[Adapter], total_steps: int) -> Step:
        return LoraStep(cast(Sequence[TripletLayer], adapters))
