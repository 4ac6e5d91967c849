"""transformers' tables of names and conversions, as its loading applies them to one model: asked here only."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Conversion(NamedTuple):
    """How a tensor of the files gets into a parameter."""

    pattern: str
    """Which of the rule's patterns it is found by; * stands for a number."""
    position: int
    """Of that pattern among the rule's."""
    operations: tuple[str, ...]
    """Name and dimensions of each that the rule applies, in order: "MergeModulelist 0", "Transpose 1 2", the latter
    with "if needed" where shapes decide."""


class ConversionRules:
    """transformers' tables for one model, as its loading applies them."""

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._by_pattern = {p: c for c in self._converters for p in c.source_patterns}
        self._model, self._prefix = model, model.base_model_prefix
        self._shapes = dict(shapes)

    def conversion_of(self, key: str) -> Conversion | None:
        """How the tensor ``key`` of the files is converted; None for a plain copy."""
        _, pattern = self._renamed(key)
        if pattern is None:
            return None
        converter = self._by_pattern[pattern]
        operations = tuple(_spelt(operation) for operation in converter.operations)
        return Conversion(pattern, list(converter.source_patterns).index(pattern), operations)

    def names_of(self, key: str) -> tuple[list[str], bool]:
        """Names in the model of what the tensor ``key`` of the files becomes, and whether that is a plain copy."""
        name, pattern = self._renamed(key)
        if pattern is None:
            return [name], True
        first, *others = self._by_pattern[pattern].target_patterns
        return [name, *(name.replace(first, other) for other in others)], False

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Of a parameter in the model."""
        return self._shapes[name]

    def converted(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What loading makes of tensors of the files that one rule takes together: {name in the model: tensor}.

        Args:
            tensors: by their names in the files, all that the rule takes, in the order of :class:`FileNames`.

        Raises:
            ValueError: the rule does not take these, whatever it says itself of it.
        """
        converter: Any = None
        for key, tensor in tensors.items():
            name, pattern = self._renamed(key)
            if pattern is None:
                raise ValueError(f"{key} is not converted")
            converter = deepcopy(self._by_pattern[pattern]) if converter is None else converter
            converter.add_tensor(name, key, pattern, tensor)
        try:
            made = converter.convert(name, model=self._model, config=self._model.config)
        except Exception as error:  # any of the library's operations
            raise ValueError(str(error)) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _renamed(self, key: str) -> tuple[str, str | None]:
        """A name in the model, and the pattern of the rule that makes more than a copy of the tensor, if any."""
        from transformers.core_model_loading import rename_source_key

        tables = (self._renamings, self._converters)
        name, pattern = rename_source_key(key, *tables, self._prefix, self._shapes)
        if name not in self._shapes and key in self._shapes:  # an old rule that takes a right name for a wrong one
            name, pattern = rename_source_key(key, [], [], self._prefix, self._shapes)
        return name, pattern


def _spelt(operation: Any) -> str:
    if type(operation).__name__ == "Transpose":
        return f"Transpose {operation.dim0} {operation.dim1}{' if needed' if operation.check_dims else ''}"
    return f"{type(operation).__name__} {getattr(operation, 'dim', '')}"
