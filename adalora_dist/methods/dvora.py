"""DVoRA: DoRA (arXiv 2402.09353) whose directions change by VeRA's update, diag(b) B diag(d) A."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from adalora_dist.config.methods.vera import DvoraConfig
from adalora_dist.methods.branch import Drawn
from adalora_dist.methods.magnitude import MagnitudeLinear, MagnitudeStep, MagnitudeUpdate
from adalora_dist.methods.protocol import Adapter, Step
from adalora_dist.methods.vera import SharedMethod, SharedUpdate, VeraLinear


class DvoraLinear(VeraLinear, MagnitudeLinear):
    """Parameters: d and b of VeRA, dm of DoRA."""

    def inner(self) -> torch.Tensor:
        return self.d.unsqueeze(1) * self.part(self.d)[0]

    def outer(self, weight: torch.Tensor) -> torch.Tensor:
        return self.b.unsqueeze(1) * weight


@dataclass(frozen=True)
class DvoraUpdate(SharedUpdate, MagnitudeUpdate):
    """d (r,), b (d_out,) and dm (d_out,)."""

    shared: Drawn
    seed: int
    d: torch.Tensor
    b: torch.Tensor

    method: ClassVar[str] = "dvora"
    formula: ClassVar[str] = MagnitudeUpdate.formula.replace("scale * P Q", "diag(b) B diag(d) A")
    vectors = ("d", "b", "dm")

    def added(self) -> torch.Tensor:
        p, a = self.factors()
        return (p * self.d) @ a


class Dvora(SharedMethod):
    """W = diag(m) V / |V|, V = W0 + diag(b) B diag(d) A."""

    config: DvoraConfig
    layer = DvoraLinear
    update = DvoraUpdate
    said = "Vectors around shared random projections, with lengths (DVoRA, [arXiv 2402.09353](https://arxiv.org/abs/2402.09353))"

    def step(self, adapters: Sequence[Adapter], total_steps: int) -> Step:
        return MagnitudeStep(cast(Sequence[DvoraLinear], adapters))
