"""``SVDLinear``: a frozen linear map plus the adapter P diag(lambda) Q."""

from __future__ import annotations

import torch
from torch import nn

from adalora_dist.lambdas import Lambdas


class SVDLinear(nn.Module):
    """``y = base(x) + scale * P (lam * (Q x))`` over any base module that maps (..., d_in) to (..., d_out).

    The base is called, never opened: ``nn.Linear``, transformers' ``Conv1D`` and quantised linears are alike.

    Parameters (float32, trainable; the paper's names):
        P: (d_out, r).
        Qt: (d_in, r), Q transposed. Engines shard dimension 0; with the long axis there, both Gram matrices P^T P
            and Q Q^T are sums over the rows that a rank holds.

    ``lam`` is this matrix's part of the model's one vector of lambdas; a :class:`Lambdas` takes the layer into it and
    must exist before the first forward.

    The branch computes in the type of the base's output. With r = 0 there is no branch and no parameter.

    ``rank`` is the number of triplets held now, ``triplets`` says which of the ``init_rank`` original ones they are:
    compaction removes the others, and the scale does not follow.
    """

    lambdas: Lambdas
    first: int
    """Of this layer's triplets in ``lambdas.lam``."""
    position: int
    """Among the layers that have any."""

    def __init__(
        self, base: nn.Module, d_in: int, d_out: int, rank: int, scale: float, dropout: float = 0.0, name: str = ""
    ) -> None:
        super().__init__()
        self.base = base
        self.name = name  # of the base in the plain model: engines and compilers change module paths
        self.d_in, self.d_out, self.rank, self.scale = d_in, d_out, rank, scale
        self.init_rank, self.triplets = rank, tuple(range(rank))
        self.dropout = nn.Dropout(dropout) if dropout else None
        if rank:
            # A base on meta is read later; adapters have their values from the start.
            device = next((p.device for p in base.parameters() if not p.is_meta), torch.device("cpu"))
            self.P = nn.Parameter(torch.empty(d_out, rank, dtype=torch.float32, device=device))
            self.Qt = nn.Parameter(torch.empty(d_in, rank, dtype=torch.float32, device=device))

    @property
    def lam(self) -> torch.Tensor:
        """(r,), a view: what is written to it under ``no_grad`` is the model's. Not while an engine shards lambda."""
        return self.lambdas.lam[self.first : self.first + self.rank]

    @torch.no_grad()
    def reset(self, generator: torch.Generator, std: float | None = 0.02) -> None:
        """P, Q ~ N(0, std^2), std None: 1/sqrt(d), so that columns have unit length on average.

        Drawn on the CPU, so that every device, rank and engine starts from the same numbers.
        """
        for x in (self.P, self.Qt):
            x.copy_(torch.randn(x.shape, generator=generator) * (std if std is not None else x.shape[0] ** -0.5))

    @torch.no_grad()
    def reset_as_lora(self, generator: torch.Generator) -> None:
        """Plain LoRA's start: B = P = 0; A = Q ~ U(-a, a), a = 1/sqrt(d_in), PyTorch's linear init.

        It goes with lambda = 1, which whoever makes the :class:`Lambdas` sets.
        """
        self.P.zero_()
        self.Qt.copy_((2 * torch.rand(self.Qt.shape, generator=generator) - 1) * self.d_in**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Two dimensions from here on, so that the add below is in place on the base's own output: no extra pass over
        # [tokens, d_out], and no view whose in-place backward would copy.
        tokens = x.reshape(-1, self.d_in)
        y = self.base(tokens)
        if self.rank:
            branch_in = tokens if self.dropout is None else self.dropout(tokens)
            # lam goes into P, not into the hidden values: backward then needs one (tokens, r) tensor, as LoRA's does.
            weight = self.lambdas.weight(self).to(y.dtype)
            hidden = branch_in.to(y.dtype) @ self.Qt.to(y.dtype)  # (tokens, r)
            y = y.addmm_(hidden.to(y.dtype), weight.T)  # under autocast the product has its type, whatever y has
        return y.view(*x.shape[:-1], self.d_out)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"
