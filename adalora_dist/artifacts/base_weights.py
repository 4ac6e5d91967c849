"""Weights of the base model, read from its files one after another: what an export is made of besides the updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import safe_open

from adalora_dist.backbones.files import weight_files
from adalora_dist.backbones.names import FileNames
from adalora_dist.backbones.rearranged import Rearranged, is_rearranged
from adalora_dist.methods.update import Update, weight_shape

U = TypeVar("U", bound=Update)


class BaseWeight(Protocol):
    """What the merged model has of the backbone in place of a tensor of its files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in the files."""
        ...

    def __call__(self, stored: torch.Tensor) -> torch.Tensor:
        """The weight, float32 on the CPU, in the layout of the files."""
        ...


def of_base(
    adapters: Sequence[U],
    base_folder: Path,
    names: FileNames,
    base_weights: Mapping[str, BaseWeight] | None,
    ask: Callable[[U, torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """What ``ask`` makes of an update and its base's weight (d_out, d_in), float32, by the name of the matrix.

    Args:
        adapters: of every adapted matrix.
        base_folder: as of :func:`adalora_dist.artifacts.export.merge`; so are ``names`` and ``base_weights``.
    """
    bases = dict(base_weights or {})
    matrices = {f"{a.name}.weight": a for a in adapters}
    found = {}

    def answer(name: str, stored: torch.Tensor) -> None:
        adapter = matrices.pop(name)
        weight = bases[name](stored) if name in bases else stored.float()
        found[adapter.name] = ask(adapter, weight.T if adapter.matrix.is_transposed else weight)

    for name in [name for name in matrices if is_rearranged(names, name)]:
        answer(name, Rearranged(names, name).read(name))
    places, _ = names.places({name: weight_shape(a) for name, a in matrices.items()}, (), base_folder)
    for shard in weight_files(base_folder):
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                if (place := places.get(key)) is not None:
                    answer(place, file.get_tensor(key))
    return found
