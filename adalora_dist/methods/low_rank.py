"""Low-rank pre-training (Kamalakara et al., arXiv 2209.13569): W = B A, and there is no other W.

The start is spectral: B = U sqrt(S), A = sqrt(S) V^T from the r largest singular values of the matrix that is replaced,
which in pre-training is one of random numbers. Everything else is trained in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from adalora_dist.backbones.linears import linear_shape
from adalora_dist.backbones.sharded_load import whole_weight
from adalora_dist.config.methods.low_rank import FactorisedConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adapter import device_of
from adalora_dist.methods.branch import BranchStep
from adalora_dist.methods.galore.projection import gram, leading
from adalora_dist.methods.protocol import Adapter, Method, Step
from adalora_dist.methods.sites import find_targets, put_around, train_in_place
from adalora_dist.methods.update import Matrix, OfMatrix


class Place(nn.Module):
    """What is left of a replaced linear map: its sizes."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.in_features, self.out_features = linear_shape(base) or (0, 0)


class FactoredLinear(Adapter):
    """``y = B (A x)``. Parameters: B (d_out, r), At (d_in, r), which is A transposed."""

    def __init__(self, base: nn.Module, name: str, rank: int) -> None:
        super().__init__()
        self.base, self.name = Place(base), name
        self.d_in, self.d_out = linear_shape(base) or (0, 0)
        self.rank = min(rank, self.d_in, self.d_out)
        device = device_of(base)
        self.B, self.At = (nn.Parameter(torch.zeros(d, self.rank, device=device)) for d in (self.d_out, self.d_in))

    @torch.no_grad()
    def start(self, weight: torch.Tensor) -> None:
        """Take the leading part of a weight (d_out, d_in)."""
        weight = weight.float()
        if self.d_out <= self.d_in:
            left = leading(gram(weight, "left"), self.rank).float()
            right = weight.T @ left  # V S
        else:
            right = leading(gram(weight, "right"), self.rank).float()
            left = weight @ right  # U S
        scaled, plain = (right, left) if self.d_out <= self.d_in else (left, right)
        roots = scaled.norm(dim=0).sqrt()
        scaled, plain = scaled / roots.clamp_min(1e-30), plain * roots
        at, b = (scaled, plain) if self.d_out <= self.d_in else (plain, scaled)
        self.B.copy_(b)
        self.At.copy_(at)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.At.T.to(x.dtype)), self.B.to(x.dtype))

    def description(self) -> dict[str, Any]:
        sizes = {"d_out": self.d_out, "d_in": self.d_in, "init_rank": self.rank}
        return sizes | {"scale": 1.0, "is_transposed": False}

    def extra_repr(self) -> str:
        return f"{self.d_in}, {self.d_out}, rank={self.rank}"


@dataclass(frozen=True)
class FactoredWeight(OfMatrix):
    """B (d_out, r) and A (r, d_in)."""

    matrix: Matrix
    B: torch.Tensor
    A: torch.Tensor

    method: ClassVar[str] = "low_rank"
    formula: ClassVar[str] = "W = B A"

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """Whatever is in the files is replaced."""
        return torch.mm(self.B, self.A, out=weight)

    @classmethod
    def shapes(cls, matrix: Matrix, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        (d_out, d_in), r = matrix.shape, matrix.rank
        return {"B": (d_out, r), "A": (r, d_in)}


class LowRank(Method):
    """Factors in the place of matrices; nothing is frozen."""

    config: FactorisedConfig
    update = FactoredWeight
    said = "Weights of low rank from the start ([arXiv 2209.13569](https://arxiv.org/abs/2209.13569))"

    def adapt(self, model: nn.Module, generator: torch.Generator) -> list[Adapter]:
        """Replace the targets, and make everything else trainable.

        Raises:
            UserError: a target without a match, or with a bias; or a parameter that is not float32.
        """
        names = find_targets(model, self.config.targets)
        if biased := [name for name in names if getattr(model.get_submodule(name), "bias", None) is not None]:
            raise UserError(
                f"method=low_rank: {biased[0]} has a bias, which factors in its place would lose: leave it out of "
                "targets, or take a model without biases (LLaMA)"
            )

        def make(base: nn.Module, name: str) -> FactoredLinear:
            layer = FactoredLinear(base, name, self.config.init_rank)
            weight = whole_weight(base)
            if not weight.is_meta:  # a dry run has shapes alone
                layer.start(weight)
            return layer

        layers = put_around(model, names, make)
        train_in_place("low_rank", model.named_parameters())
        return list(layers)

    def step(self, adapters: Sequence[Adapter], total_steps: int) -> Step:
        return BranchStep(cast(Any, adapters))

    @classmethod
    def layer_of(cls, base: nn.Module, update: FactoredWeight) -> FactoredLinear:
        return FactoredLinear(base, update.name, update.rank)
