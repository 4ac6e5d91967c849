"""Parameters whose numbers transformers moves about while it loads: split off, joined, transposed, permuted.

Where each goes is found out by sending positions instead of values the same way: laid end to end, the tensors of the
files that a rule takes together are numbered, and loaded. If every number arrives once, values can be read, and written
back, by them, whatever the rule does. Rules that compute (dequantise, pad) fail this, and cannot be written back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate, pairwise
from math import prod

import torch
from safetensors import safe_open

from adalora_dist.backbones.files import Stored
from adalora_dist.backbones.names import FileNames
from adalora_dist.io.errors import UserError

Change = Callable[[torch.Tensor], torch.Tensor]
"""A parameter's value in the files, float32 -> its new one."""


class Rearranged:
    """The tensors of the files that one rule takes together, and the parameters that they become.

    Args:
        names: of a model in its files.
        name: of one of these parameters.

    Raises:
        UserError: not every number of the tensors is one of a parameter's.
    """

    def __init__(self, names: FileNames, name: str) -> None:
        self._names, self.sources = names, names.sources[names.known_as(name)]
        try:
            self.positions()
        except ValueError:
            names.source_of(name)  # says so
            raise

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the tensors in the files."""
        return tuple(source.key for source in self.sources)

    def positions(self) -> dict[str, torch.Tensor]:
        """Where each parameter's numbers lie in the tensors of the files, laid end to end; int64, of its shape.

        Raises:
            ValueError: not every number is there once.
        """
        assert self._names.rules is not None
        ends = [0, *accumulate(prod(source.shape) for source in self.sources)]
        numbered = {
            source.key: torch.arange(start, stop).view(source.shape)
            for source, (start, stop) in zip(self.sources, pairwise(ends), strict=True)
        }
        found = self._names.rules.converted(numbered)
        is_there = torch.zeros(ends[-1], dtype=torch.bool)
        for where in found.values():
            if where.dtype != torch.int64 or where.min() < 0 or where.max() >= ends[-1]:
                raise ValueError("numbers are computed")
            is_there[where.flatten()] = True
        if not is_there.all() or sum(where.numel() for where in found.values()) != ends[-1]:
            raise ValueError("numbers are lost, or there twice")
        return found

    def read(self, name: str) -> torch.Tensor:
        """A parameter as it is loaded from the files, in their type."""
        flat = torch.cat([_read(source).flatten() for source in self.sources])
        return flat[self.positions()[self._names.known_as(name)]]

    def changed(self, key: str, stored: torch.Tensor, changes: Mapping[str, Change]) -> torch.Tensor:
        """One of the tensors, when some of the parameters have changed.

        Args:
            key: its name in the files.
            stored: its value there, float32.
            changes: by parameter name.
        """
        flats = [(stored if source.key == key else _read(source).float()).flatten() for source in self.sources]
        flat, positions = torch.cat(flats), self.positions()
        for name, change in changes.items():
            where = positions[self._names.known_as(name)]
            flat[where] = change(flat[where]).to(flat.dtype)
        parts: tuple[torch.Tensor, ...] = flat.split([len(part) for part in flats])
        return parts[self.keys.index(key)].view(stored.shape)


def check_shape(names: FileNames, name: str, shape: tuple[int, ...]) -> None:
    """Raise a ``UserError`` if a parameter that is rearranged has another shape than the run's."""
    assert names.rules is not None
    if (found := names.rules.shape_of(names.known_as(name))) != shape:
        raise UserError(
            f"{name} has shape {found} in the base, the run's has {shape}: merge into the run's own base, not quantised"
        )


def is_rearranged(names: FileNames, name: str) -> bool:
    """Whether loading does more than copy a parameter. Stacks of experts count as none: their files are written by
    expert (:mod:`adalora_dist.backbones.expert_files`), and in full not at all."""
    known = names.known_as(name)
    return known in names.computed and names.rules is not None and len(names.rules.shape_of(known)) < 3


def _read(source: Stored) -> torch.Tensor:
    with safe_open(source.file, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(source.key)
    return tensor
