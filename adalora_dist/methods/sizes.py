"""How many numbers a method trains at each size that its adapters can have: from shapes alone, exactly.

A method's :meth:`~adalora_dist.methods.protocol.Method.sizes` gives one :class:`Sizes`; ``parameter_budget.py`` picks
the largest size within a budget, the same way for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """The sizes smallest..largest of a method's adapters in one model. Heads and train_modules are not in it."""

    count: Callable[[int], int]
    """Numbers that are trained at a size; never fewer at a larger one."""
    settings: Callable[[int], dict[str, Any]]
    """What a size is in the method's section of settings: {"init_rank": 8}."""
    largest: int
    """Beyond it nothing more can be learnt."""
    why_largest: str
    """In a few words: "the rank of the largest matrix"."""
    smallest: int = 1


def of_ranks(
    shapes: Sequence[tuple[int, int]], each: int, fixed: int = 0, setting: str = "init_rank", smallest: int = 1
) -> Sizes:
    """One rank, or width of a bottleneck, for all matrices.

    Args:
        shapes: what every adapter goes between: (d_in, d_out) of its matrix.
        each: trained numbers, over all matrices, that one rank more adds.
        fixed: trained numbers that no rank changes.
        setting: that says the rank.
    """
    return Sizes(
        lambda rank: fixed + each * rank,
        lambda rank: {setting: rank},
        max(min(shape) for shape in shapes),
        "the full rank of the largest matrix",
        smallest,
    )
