"""Hydra (arXiv 2309.06922): beside each matrix a low-rank branch, and behind it another, which reads what it gives.

y = y0 + P Q x + U V y0, where y0 is the base's output, its bias included. No scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import nn

from adalora_dist.config.methods.hydra import HydraConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adapter import lora_start
from adalora_dist.methods.branch import BranchLinear, BranchStep
from adalora_dist.methods.protocol import Adapter, Method, Step
from adalora_dist.methods.sites import find_targets, put_around, target_shapes
from adalora_dist.methods.sizes import Sizes
from adalora_dist.methods.update import AdapterWeights, Matrix, OfMatrix

_KINDS = ("P", "Qt", "U", "Vt")
SEQUENTIAL_OF_PARALLEL = 2
"""Ranks of the branches, as published (8 and 4); where a parameter budget says both."""


class HydraLinear(BranchLinear):
    """Its rank is that of both branches together, as it is of plain LoRA of the same function.

    Parameters, float32; P and U are 0 at the start, Qt and Vt drawn as LoRA's A:
        P: (d_out, r_parallel).
        Qt: (d_in, r_parallel).
        U: (d_out, r_sequential).
        Vt: (d_out, r_sequential).
    """

    def __init__(self, base: nn.Module, name: str, parallel: int, sequential: int, dropout: float = 0.0) -> None:
        super().__init__(base, name, parallel + sequential, dropout=dropout)
        self.sequential_rank = sequential
        self.P, self.Qt = self.vector(self.d_out, parallel), self.vector(self.d_in, parallel)
        self.U, self.Vt = self.vector(self.d_out, sequential), self.vector(self.d_out, sequential)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Kaiming's uniform numbers, drawn on the CPU: within 1/sqrt of what a row reads."""
        for matrix in (self.Qt, self.Vt):
            matrix.copy_(lora_start(matrix.shape, len(matrix), generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, self.d_in)
        y: torch.Tensor = self.base(tokens)
        read, given = (tokens, y) if self.dropout is None else (self.dropout(tokens), self.dropout(y))
        hidden = torch.cat((read.to(y.dtype) @ self.Qt.to(y.dtype), given @ self.Vt.to(y.dtype)), dim=1)
        weight = torch.cat((self.P, self.U), dim=1)
        # Not in place: the sequential branch has read y, and its gradient needs y as it was.
        return torch.addmm(y, hidden.to(y.dtype), weight.to(y.dtype).T).view(*x.shape[:-1], self.d_out)

    def description(self) -> dict[str, Any]:
        return super().description() | {"sequential_rank": self.sequential_rank}


@dataclass(frozen=True)
class HydraUpdate(OfMatrix):
    """P (d_out, r_parallel), Q (r_parallel, d_in), U (d_out, r_sequential) and V (r_sequential, d_out)."""

    matrix: Matrix
    P: torch.Tensor
    Q: torch.Tensor
    U: torch.Tensor
    V: torch.Tensor

    method: ClassVar[str] = "hydra"
    formula: ClassVar[str] = "W = W0 + P Q + U V W0, b = b0 + U V b0"
    changes_bias = True

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """W0 is whatever is given: the original, or the dequantised one that the branch has seen."""
        rows = weight.T if self.matrix.is_transposed else weight
        rows += self.P @ self.Q + self.U @ (self.V @ rows)
        return weight

    def merged_bias(self, bias: torch.Tensor) -> torch.Tensor:
        return bias + self.U @ (self.V @ bias)

    def lora_with(self, read: torch.Tensor) -> AdapterWeights:
        """Plain LoRA of the same function, for a matrix without a bias.

        Args:
            read: V W0, (r_sequential, d_in).
        """
        p, q = torch.cat((self.P, self.U), dim=1), torch.cat((self.Q, read))
        return AdapterWeights(self.name, p, torch.ones(self.rank), q, 1.0, self.matrix.is_transposed)

    @staticmethod
    def no_lora(name: str) -> str:
        """Why there is no such LoRA of a matrix with a bias."""
        return (
            f"hydra's sequential branch changes the bias of {name}, too, which plain LoRA cannot hold: use the merged "
            "model, or leave matrices with biases out of targets"
        )

    def settings(self) -> dict[str, Any]:
        return {"sequential_rank": len(self.V)}

    @classmethod
    def shapes(cls, matrix: Matrix, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        (d_out, d_in), rank = matrix.shape, settings.get("sequential_rank")
        if type(rank) is not int or not 1 <= rank < matrix.rank:
            raise UserError(
                f"adapter.json: settings: sequential_rank is {rank!r:.50}, must be an integer from 1 to "
                f"{matrix.rank - 1}: copy it again"
            )
        first = matrix.rank - rank
        return {"P": (d_out, first), "Q": (first, d_in), "U": (d_out, rank), "V": (rank, d_out)}


class Hydra(Method):
    """y = y0 + P Q x + U V y0."""

    config: HydraConfig
    update = HydraUpdate
    said = "Parallel and sequential branches (Hydra, [arXiv 2309.06922](https://arxiv.org/abs/2309.06922))"

    def adapt(self, model: nn.Module, generator: torch.Generator) -> list[Adapter]:
        config = self.config
        make = partial(
            HydraLinear, parallel=config.init_rank, sequential=config.sequential_rank, dropout=config.dropout
        )
        layers = put_around(model, find_targets(model, config.targets), make)
        for layer in layers:
            layer.reset(generator)
        return list(layers)

    def sizes(self, model: nn.Module) -> Sizes:
        """The sequential branch at twice the rank of the parallel one, as published."""
        shapes = target_shapes(model, self.config.targets)
        each = sum(d_in + d_out + 2 * SEQUENTIAL_OF_PARALLEL * d_out for d_in, d_out in shapes)
        largest = max(min(shape) for shape in shapes)

        def settings(rank: int) -> dict[str, int]:
            return {"init_rank": rank, "sequential_rank": SEQUENTIAL_OF_PARALLEL * rank}

        return Sizes(lambda rank: each * rank, settings, largest, "the full rank of the largest matrix")

    def lacks(self, adapters: Sequence[Adapter], form: str) -> str | None:
        biased = (adapter.name for adapter in adapters if getattr(adapter.base, "bias", None) is not None)
        return HydraUpdate.no_lora(name) if form == "lora" and (name := next(biased, "")) else None

    def step(self, adapters: Sequence[Adapter], total_steps: int) -> Step:
        return BranchStep(cast(Sequence[BranchLinear], adapters))

    @classmethod
    def layer_of(cls, base: nn.Module, update: HydraUpdate) -> HydraLinear:
        return HydraLinear(base, update.name, len(update.Q), len(update.V))
