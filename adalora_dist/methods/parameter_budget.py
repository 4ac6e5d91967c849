"""One budget of trained parameters for all methods: the largest size that is within it, and what that comes to.

Shapes alone are read, so the model may be on meta, quantised or sharded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from adalora_dist.config.budget import parse_budget
from adalora_dist.config.methods import MethodConfig, SizedConfig, TargetsConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods import method_for
from adalora_dist.methods.shares import weight_shares
from adalora_dist.methods.sites import find_sites, trained_modules
from adalora_dist.methods.sizes import Sizes
from adalora_dist.sharding.tensors import full_numel


@dataclass(frozen=True)
class Fitted:
    """What a budget has come to."""

    config: MethodConfig
    """With the sizes found in the place of the budget."""
    sizes: Mapping[str, Any]
    """These, by their settings."""
    budget: str
    """As it was given."""
    limit: int
    """What that is in parameters of this model."""
    num_trained: int
    """Parameters that the method trains; where ranks adapt, in the end and spread evenly."""
    num_next: int | None
    """The same one size larger; None: there is none."""
    num_besides: int
    """Trained in full with train_modules, outside the budget."""

    @property
    def num_missing(self) -> int:
        """How far off the budget it is."""
        return self.limit - self.num_trained

    def as_record(self) -> dict[str, Any]:
        """For run.json."""
        counts = {"limit": self.limit, "num_trained": self.num_trained, "num_besides": self.num_besides}
        return {"budget": self.budget, **counts, **self.sizes}

    def as_sentence(self) -> str:
        config, sizes = self.config, ", ".join(f"{name} {value:,}" for name, value in self.sizes.items())
        found = f"{self.num_trained:,} trained" + (" in the end, if spread evenly" if config.adapts_ranks else "")
        nearest = "" if self.num_next is None else f", one size more {self.num_next:,}"
        besides = f"; besides {self.num_besides:,} in train_modules" if self.num_besides else ""
        return f"{self.budget} = {self.limit:,} parameters: {sizes or config.method}, {found}{nearest}{besides}"


def within_budget(model: nn.Module, config: MethodConfig) -> MethodConfig:
    """``config`` with the largest sizes whose parameters are within its ``budget``; as it is where it has none.

    Args:
        model: plain, without adapters; may be on meta.

    Raises:
        UserError: the budget is below what the method trains at least in this model, or above what it can at most.
    """
    fitted = fit(model, config)
    return config if fitted is None else fitted.config


def positions_taken(model: nn.Module, config: MethodConfig) -> int:
    """Positions of the model that the method leaves no text. Arguments and errors as of :func:`within_budget`."""
    return within_budget(model, config).num_positions if config.num_positions else 0


def fit(model: nn.Module, config: MethodConfig) -> Fitted | None:
    """:func:`within_budget`, with the counts; None where no budget is set. Raises as that."""
    if not isinstance(config, SizedConfig) or config.budget is None:
        return None
    sizes = method_for(config).sizes(model)
    limit = parse_budget(config.budget).limit(sum(weight_shares(model).values()))
    size = _largest_within(sizes, limit)
    largest = sizes.count(sizes.largest)
    if size is None or (size == sizes.largest and limit > largest and limit >= sizes.count(size + 1)):
        raise UserError(_out_of_range(config, sizes, limit))
    return Fitted(
        config=config.sized(sizes.settings(size)),
        sizes=sizes.settings(size),
        budget=config.budget,
        limit=limit,
        num_trained=sizes.count(size),
        num_next=sizes.count(size + 1) if size < sizes.largest else None,
        num_besides=_num_besides(model, config),
    )


def _largest_within(sizes: Sizes, limit: int) -> int | None:
    """By bisection; None: even the smallest exceeds the limit."""
    low, high = sizes.smallest, sizes.largest
    if sizes.count(low) > limit:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sizes.count(middle) <= limit else (low, middle - 1)
    return low


def _out_of_range(config: SizedConfig, sizes: Sizes, limit: int) -> str:
    fewest, most = sizes.count(sizes.smallest), sizes.count(sizes.largest)
    given = f"budget={config.budget} ({limit:,} parameters): {config.method} cannot train so"
    if fewest == most:
        amount = "few" if limit < most else "many"
        return f"{given} {amount} in this model, but {most:,} ({sizes.why_largest}): leave budget out"
    where = "widen targets, " if isinstance(config, TargetsConfig) and limit > most else ""
    if limit < fewest:
        where = "narrow targets, " if isinstance(config, TargetsConfig) else ""
        bound = f"few in this model; the fewest are {fewest:,}"
    else:
        bound = f"many in this model; the most are {most:,} ({sizes.why_largest})"
    return f"{given} {bound}: set budget to {fewest}..{most}, {where}or take another method"


def _num_besides(model: nn.Module, config: MethodConfig) -> int:
    """Parameters of ``train_modules``, less the weights there that adapters freeze."""
    names, stacks = find_sites(model, config) if isinstance(config, TargetsConfig) else ([], [])
    frozen = {id(p) for name in names for p in model.get_submodule(name).parameters()}
    frozen |= {id(model.get_parameter(stack.name)) for stack in stacks}
    named = {id(p): p for name in trained_modules(model, config) for p in model.get_submodule(name).parameters()}
    return sum(full_numel(p) for key, p in named.items() if key not in frozen)
