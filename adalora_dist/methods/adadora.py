"""AdaDoRA: DoRA (arXiv 2402.09353) whose directions are AdaLoRA's triplets (arXiv 2303.10512), with its budget.

W = diag(m) V / |V|, V = W0 + s P diag(lambda) Q. The allocator sees the triplets alone. A triplet that goes changes V,
and so c = m / |V|; m stays as it was learnt: set to |V| again, it would be turned off. A matrix of rank 0 keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import nn

from adalora_dist.backbones.experts import ExpertStack
from adalora_dist.config.methods import AdaDoraConfig
from adalora_dist.methods.adalora.allocator import RankAllocator
from adalora_dist.methods.adalora.layers import SVDLinear
from adalora_dist.methods.adalora.method import AdaptiveMethod
from adalora_dist.methods.adalora.schedule import BudgetSchedule
from adalora_dist.methods.dora import DoraUpdate
from adalora_dist.methods.magnitude import LengthsStep, RowLengths
from adalora_dist.methods.protocol import Adapter, Step, adapters_of
from adalora_dist.methods.sites import find_targets, target_shapes
from adalora_dist.methods.sizes import Sizes
from adalora_dist.methods.update import AdapterWeights, Update


class AdaDoraLinear(RowLengths, SVDLinear):
    """Parameters: P and Qt of a :class:`TripletLayer`, which has lambda elsewhere, and dm."""

    can_be_packed = False  # the lengths of rows are measured outside of a forward, too

    def __init__(
        self, base: nn.Module, d_in: int, d_out: int, rank: int, scale: float, dropout: float = 0.0, name: str = ""
    ) -> None:
        super().__init__(base, d_in, d_out, rank, scale, dropout, name)
        self.add_lengths()

    def branch(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.rank:
            return tokens[:, :0], self.dm.new_zeros(self.d_out, 0)
        return tokens @ self.Qt.to(tokens.dtype), self.lambdas.weight(self)

    def inner(self) -> torch.Tensor:
        return self.Qt.T if self.rank else self.dm.new_zeros(0, self.d_in)

    def made_of(self) -> list[torch.Tensor]:
        return [*super().made_of(), self.lambdas.lam]


class AdaDoraStep(LengthsStep, RankAllocator):
    """The allocator's, over layers with lengths."""

    def __init__(self, layers: Sequence[AdaDoraLinear], config: AdaDoraConfig, schedule: BudgetSchedule) -> None:
        super().__init__(layers, config, schedule)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Those of the allocator, then dm of each matrix."""
        found, lengths = super().parameters(), {f"{layer.name}.dm" for layer in self.layers}
        return dict(sorted(found.items(), key=lambda item: item[0] in lengths))


class AdaDora(AdaptiveMethod):
    """W = diag(m) V / |V|, V = W0 + s P diag(lambda) Q. It leaves what DoRA does, every matrix at its own rank."""

    config: AdaDoraConfig
    layer: ClassVar[type[SVDLinear]] = AdaDoraLinear
    update = DoraUpdate
    said = (
        "Adaptive-rank adapters of directions, and lengths (AdaLoRA, "
        "[arXiv 2303.10512](https://arxiv.org/abs/2303.10512), in DoRA, "
        "[arXiv 2402.09353](https://arxiv.org/abs/2402.09353))"
    )

    def sites(self, model: nn.Module) -> tuple[list[str], list[ExpertStack]]:
        return find_targets(model, self.config.targets), []

    def sizes(self, model: nn.Module) -> Sizes:
        shapes = target_shapes(model, self.config.targets)
        return self.sizes_of(shapes, sum(d_out for _, d_out in shapes))

    def undecayed(self, model: nn.Module) -> list[torch.Tensor]:
        return [cast(AdaDoraLinear, layer).dm for layer in adapters_of(model)]

    def step(self, adapters: Sequence[Adapter], total_steps: int) -> Step:
        layers = cast(Sequence[AdaDoraLinear], adapters)
        return AdaDoraStep(layers, self.config, self.schedule(layers, total_steps))

    @classmethod
    def updates(
        cls,
        described: Mapping[str, Mapping[str, Any]],
        held: Mapping[str, Sequence[int]],
        keep: torch.Tensor | None,
        whole: Callable[[str], torch.Tensor | None],
    ) -> Sequence[Update]:
        triplets = cast(Sequence[AdapterWeights], super().updates(described, held, keep, whole))
        lengths = [cast(torch.Tensor, whole(f"{each.name}.dm")) for each in triplets]
        return [DoraUpdate(t.matrix, dm, t.P * t.lam, t.Q) for t, dm in zip(triplets, lengths, strict=True)]
