"""``Adapter``: a module of a method's in the place of, or around, one of the model's."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


class TrainedModule(nn.Module):
    """A module of a method's that holds trained parameters: an adapter, or what several adapters share."""

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters held here now, by the names that files have, whatever an engine does to paths."""
        raise NotImplementedError(f"{type(self).__name__}.trained")

    def element_name(self, leaf: str, index: int) -> str:
        """What a person calls element ``index`` of the flattened parameter ``leaf``, for messages."""
        raise NotImplementedError(f"{type(self).__name__}.element_name")


_OWN_MARKS = ("weights_on_disk", "plain_name")
"""What the package itself puts on a model's modules."""


class Adapter(TrainedModule):
    """A module in the place of, or around, one of the model's.

    The base is called, never opened; all that the adapter does not hold itself is frozen.

    The adapter answers its base's attributes (``weight``, ``in_features``, what a quantised linear has): model code
    asks for them, as T5 does for ``wo.weight.dtype``. They are no parameters of the adapter. Code that computes with
    such a weight goes past the adapter: :mod:`adalora_dist.backbones.bypass` finds it beforehand.
    """

    name: str
    """The name that the adapted module has in the plain model. (Engines and compilers change module paths.)"""
    base: nn.Module

    def __getattr__(self, name: str) -> Any:
        """Look up in the base what the adapter lacks: data alone, neither methods nor the marks of engines.

        A method of the base would compute without the adapter, and an engine must not take its mark on the base for
        one on the adapter.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name.startswith(("_", "ds_")) or name in _OWN_MARKS:
                raise
            value = getattr(base, name, self)
            if value is self or inspect.ismethod(value):
                raise
            return value

    def description(self) -> dict[str, Any]:
        """What an export needs to know besides the parameters: sizes, scale; plain data."""
        raise NotImplementedError(f"{type(self).__name__}.description")

    def held(self) -> list[int]:
        """Which of its parts (triplets) are left, as ascending indices into those at the start of the run."""
        raise NotImplementedError(f"{type(self).__name__}.held")

    @property
    def part_size(self) -> int:
        """How many trained numbers one of its parts has."""
        raise NotImplementedError(f"{type(self).__name__}.part_size")
