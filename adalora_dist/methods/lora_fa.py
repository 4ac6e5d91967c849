"""LoRA-FA (arXiv 2308.03303): LoRA whose A is drawn and frozen; B is trained.

W = W0 + s B A. As A needs no gradient, autograd keeps A x of a forward, r numbers per token, and never x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from adalora_dist.config.methods.lora_fa import LoraFaConfig
from adalora_dist.methods.adalora.method import TripletMethod
from adalora_dist.methods.adapter import lora_start
from adalora_dist.methods.branch import BranchLinear, BranchStep, Drawn, drawn_seed
from adalora_dist.methods.projection import ProjectedStep
from adalora_dist.methods.protocol import Adapter, Method, Step
from adalora_dist.methods.sites import find_targets, put_around, target_shapes
from adalora_dist.methods.sizes import Sizes, of_ranks
from adalora_dist.methods.update import AdapterWeights, Update


def frozen_a(seed: int, rank: int, d_in: int, digest: str | None = None) -> Drawn:
    """A (r, d_in) ~ U(-a, a), a = 1/sqrt(d_in), as LoRA starts."""
    return Drawn(partial(_draw_a, seed, rank, d_in), f"A of LoRA-FA, {rank} x {d_in}", digest)


def _draw_a(seed: int, rank: int, d_in: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (lora_start((rank, d_in), d_in, generator),)


class LoraFaLinear(BranchLinear):
    """Parameter: P (d_out, r), LoRA's B, 0 at the start."""

    def __init__(self, base: nn.Module, name: str, config: LoraFaConfig, generator: torch.Generator) -> None:
        super().__init__(base, name, config.init_rank, config.scale, config.dropout)
        self.seed = drawn_seed(generator)
        self.drawn = frozen_a(self.seed, self.rank, self.d_in)
        self.P = self.vector(self.d_out, self.rank)

    def branch(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        [a] = self.drawn.like(tokens)
        return tokens @ a.T, self.scale * self.P

    def description(self) -> dict[str, Any]:
        return super().description() | {"seed": self.seed, "sha256": self.drawn.digest()}


class LoraFa(Method):
    """What it leaves is LoRA, and so are its adapter folders."""

    config: LoraFaConfig
    said = "Low-rank adapters (LoRA-FA, [arXiv 2308.03303](https://arxiv.org/abs/2308.03303))"

    def adapt(self, model: nn.Module, generator: torch.Generator) -> list[Adapter]:
        make = partial(LoraFaLinear, config=self.config, generator=generator)
        return list(put_around(model, find_targets(model, self.config.targets), make))

    def sizes(self, model: nn.Module) -> Sizes:
        shapes = target_shapes(model, self.config.targets)
        return of_ranks(shapes, sum(d_out for _, d_out in shapes))

    def step(self, adapters: Sequence[Adapter], total_steps: int) -> Step:
        layers = cast(Sequence[LoraFaLinear], adapters)
        if not self.config.projected:
            return BranchStep(layers)
        return ProjectedStep(layers, [layer.drawn.matrices[0] for layer in layers])

    @classmethod
    def updates(
        cls,
        described: Mapping[str, Mapping[str, Any]],
        held: Mapping[str, Sequence[int]],
        keep: torch.Tensor | None,
        whole: Callable[[str], torch.Tensor | None],
    ) -> Sequence[Update]:
        """A is drawn again.

        Raises:
            UserError: this torch draws another.
        """
        updates = []
        for name, matrix in described.items():
            b = cast(torch.Tensor, whole(f"{name}.P"))
            drawn = frozen_a(matrix["seed"], matrix["init_rank"], matrix["d_in"], matrix["sha256"])
            lam, [a] = torch.ones(matrix["init_rank"]), drawn.matrices
            updates.append(AdapterWeights(name, b, lam, a, matrix["scale"], matrix["is_transposed"]))
        return updates

    @classmethod
    def place(cls, model: nn.Module, updates: Sequence[Update]) -> list[Adapter]:
        return TripletMethod.place(model, updates)
