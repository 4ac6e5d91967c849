"""What one matrix has become when training is over."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adalora_dist.backbones.files import base_folder_of as base_folder_of


@dataclass(frozen=True)
class AdapterWeights:
    """The active triplets of one matrix, on the CPU, float32: P (d_out, k), lam (k,), Q (k, d_in)."""

    name: str
    P: torch.Tensor
    lam: torch.Tensor
    Q: torch.Tensor
    scale: float
    weight_is_transposed: bool
    """Whether the base stores its weight as (d_in, d_out), as transformers' Conv1D does."""

    @property
    def rank(self) -> int:
        """Number of active triplets, k."""
        return self.lam.numel()

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the base's weight."""
        d_out, d_in = len(self.P), self.Q.shape[1]
        return (d_in, d_out) if self.weight_is_transposed else (d_out, d_in)

    def add_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Add s P diag(lambda) Q to a float32 weight in the layout of the base's, in place."""
        p = self.P * (self.scale * self.lam)
        return weight.addmm_(self.Q.T, p.T) if self.weight_is_transposed else weight.addmm_(p, self.Q)

    def delta(self) -> torch.Tensor:
        """s P diag(lambda) Q in the layout of the base's weight, float32."""
        return self.add_to(torch.zeros(self.weight_shape))
