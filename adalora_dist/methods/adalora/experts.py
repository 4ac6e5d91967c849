"""``ExpertTriplets``: the adapters of all experts for one projection, side by side in one P and one Q.

Every expert has its own triplets, and its own rank: to a budget it is a matrix like any other. The base's stack is not
touched, and no product of the size of a stack is made: each token's expert adds P diag(lambda) Q x, in two grouped
products over the tokens as they are sorted for the base's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import nn

from adalora_dist.backbones.experts import ExpertStack, grouped_product, run_with
from adalora_dist.methods.adalora.layers import TripletLayer
from adalora_dist.methods.adalora.widening import Ragged
from adalora_dist.methods.adapter import device_of

MODULE_NAME = "adapters"
"""Under which a module of experts has its :class:`ExpertAdapters`."""


class ExpertTriplets(TripletLayer):
    """Adds ``scale * P_e (lam_e * (Q_e x))`` to what expert e makes of its tokens.

    P is (d_out, sum of ranks), Qt (d_in, sum of ranks), expert after expert.

    Args:
        experts: the module that holds the stack.
        ranks: of every expert at the start.
    """

    experts: nn.Module

    def __init__(
        self, experts: nn.Module, stack: ExpertStack, ranks: Sequence[int], scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__(stack.name, stack.d_in, stack.d_out, ranks, scale, dropout, device_of(experts))
        self.stack = stack
        self.__dict__["experts"] = experts  # which is the parent, not a part
        self.num_tokens: torch.Tensor | None = None

    @property
    def path(self) -> str:
        return f"{self.stack.owner}.{MODULE_NAME}.{self.stack.leaf}"

    def matrix_names(self) -> list[str]:
        return self.stack.matrix_names()

    def count_tokens(self) -> None:
        """From now on ``num_tokens``, (experts,) float64, counts those of training, until it is set to 0."""
        device = self.P.device if self.rank else torch.device("cpu")
        self.num_tokens = torch.zeros(self.stack.num_experts, dtype=torch.float64, device=device)

    def adapts(self) -> list[tuple[nn.Module, str]]:
        return [(self.experts, self.stack.leaf)]

    def description(self) -> dict[str, Any]:
        sizes = {"d_out": self.d_out, "d_in": self.d_in, "init_rank": self.init_rank}
        own = {"scale": self.scale, "is_transposed": self.stack.is_transposed, "init_ranks": list(self.init_ranks)}
        return {**sizes, **own}

    def forward(self, x: torch.Tensor, offsets: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """What is to be added, (rows, d_out).

        Args:
            x: (rows, d_in) sorted by expert, whose rows end at ``offsets``; (experts, rows, d_in) without offsets.
            dtype: of the base's own product.
        """
        if self.num_tokens is not None and self.training:
            counted = offsets.diff(prepend=offsets.new_zeros(1)) if offsets is not None else x.any(-1).sum(-1)
            self.num_tokens = self.num_tokens.to(x.device).add_(counted)
        x = (x if self.dropout is None else self.dropout(x)).to(dtype)
        weight, qt = self.lambdas.factors(self)
        q, p = self._by_expert(qt.to(dtype)), self._by_expert(weight.to(dtype)).transpose(1, 2)
        if offsets is None:
            return torch.bmm(torch.bmm(x, q), p)
        return grouped_product(grouped_product(x, q, offsets), p, offsets)

    def ragged(self) -> tuple[Ragged, Ragged] | None:
        """Widths are whole multiples of 16 bytes, at which grouped products want matrices to begin."""
        ranks = self.ranks
        unit = 8 if torch.cuda.is_available() else max(1, 16 // getattr(self.experts, self.stack.leaf).element_size())
        width = -(-max(ranks) // unit) * unit
        if set(ranks) == {width}:
            return None
        return Ragged(self.d_out, tuple(ranks), width, fill=True), Ragged(self.d_in, tuple(ranks), width, fill=False)

    def _by_expert(self, matrix: torch.Tensor) -> torch.Tensor:
        """(d, experts * width) -> (experts, d, width)."""
        return matrix.view(len(matrix), self.stack.num_experts, -1).transpose(0, 1)


class ExpertAdapters(nn.ModuleDict):
    """By projection, what is added to the experts of one layer. A child of the module that holds their stacks."""

    def add(self, leaf: str, x: torch.Tensor, offsets: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:
        """As ``run_with`` wants it."""
        adapter = cast(ExpertTriplets, self[leaf]) if leaf in self else None
        if adapter is None or not adapter.rank or not adapter.takes_part():
            return y
        added: torch.Tensor = adapter(x, offsets, y.dtype)
        return y.add_(added)


def put_beside(
    model: nn.Module, stacks: Sequence[ExpertStack], make: Callable[[nn.Module, ExpertStack], ExpertTriplets]
) -> None:
    """Add what ``make`` gives for each stack and the module that holds it.

    Raises:
        UserError: as of :func:`adalora_dist.backbones.experts.run_with`.
    """
    for stack in stacks:
        experts = model.get_submodule(stack.owner)
        layer = make(experts, stack)
        getattr(experts, stack.leaf).requires_grad_(False)  # it may lie in a module of train_modules
        if MODULE_NAME not in experts._modules:
            adapters = ExpertAdapters()
            run_with(experts, adapters.add)
            experts.add_module(MODULE_NAME, adapters)
        cast(ExpertAdapters, experts._modules[MODULE_NAME])[stack.leaf] = layer
        layer.train(experts.training)


def parts_of(name: str, described: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """(name, first and last but one of its triplets at the start) of every matrix of an adapter, from what it said of
    itself."""
    if "init_ranks" not in described:
        return [(name, 0, described["init_rank"])]
    ends = [0, *accumulate(described["init_ranks"])]
    owner, _, leaf = name.rpartition(".")
    return [(f"{owner}.{expert}.{leaf}", first, stop) for expert, (first, stop) in enumerate(pairwise(ends))]
