"""The backbone's weights as its files have them, or what takes their place: what an export adds updates to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from adalora_dist.backbones.files import weight_files
from adalora_dist.backbones.names import FileNames
from adalora_dist.methods.update import Update, weight_shape


class BaseWeight(Protocol):
    """What the merged model has of the backbone in place of a tensor of its files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in the files."""
        ...

    def __call__(self, stored: torch.Tensor) -> torch.Tensor:
        """The weight, float32 on the CPU, in the layout of the files."""
        ...


def row_norms(
    adapters: Sequence[Update], base_folder: Path, names: FileNames, base_weights: Mapping[str, BaseWeight] | None
) -> dict[str, torch.Tensor]:
    """By the name of each adapted matrix the lengths (d_out,) of its base's rows, float32; arguments as of merge."""
    bases = dict(base_weights or {})
    matrices = {f"{a.name}.weight": a for a in adapters}
    places, _ = names.places({name: weight_shape(a) for name, a in matrices.items()}, (), base_folder)
    found = {}
    for shard in weight_files(base_folder):
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                if (name := places.get(key)) is not None:
                    stored = file.get_tensor(key)
                    weight = bases[name](stored) if name in bases else stored.float()
                    matrix = matrices[name].matrix
                    found[matrix.name] = torch.linalg.vector_norm(weight, dim=0 if matrix.is_transposed else 1)
    return found
