"""A budget of trained parameters as users write it: ``0.3M``, ``40K``, ``331776``, or ``0.32%`` of the model's."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


class ParameterBudget(NamedTuple):
    """What a text says."""

    amount: Fraction
    is_share: bool
    """Whether it is of the parameters that the model has, or parameters itself."""

    def limit(self, num_parameters: int) -> int:
        """The largest count that is within it, for a model of ``num_parameters``."""
        return int(self.amount * num_parameters if self.is_share else self.amount)


def parse_budget(text: str) -> ParameterBudget:
    """Exactly: 0.3M is 300,000, not what a binary fraction makes of it.

    Raises:
        ValueError: it is neither a count >= 1 nor a share of at most 100%.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+) ?([KMB%]?)", text.strip(), re.IGNORECASE)
    if found:
        number, unit = Fraction(found[1]), found[2].upper()
        if unit == "%" and 0 < number <= 100:
            return ParameterBudget(number / 100, True)
        if unit != "%" and number * _UNITS[unit] >= 1:
            return ParameterBudget(number * _UNITS[unit], False)
    raise ValueError(
        f"budget {text} is no number of parameters: write 331776, 40K or 0.3M, at least 1, or a share of the model's, "
        "such as 0.32%; or leave it out"
    )
