"""AdaLoRA as a method."""

from __future__ import annotations

import torch

from adalora_dist.backbones.files import base_folder_of as base_folder_of
from adalora_dist.backbones.linears import is_conv1d
from adalora_dist.methods.adalora.allocator import RankAllocator
from adalora_dist.methods.update import AdapterWeights


def gather_adapters(allocator: RankAllocator) -> list[AdapterWeights]:
    """The adapters of a finished run. Collective: every process calls it and gets all of them."""
    keep = torch.ones(sum(allocator.ranks), dtype=torch.bool) if allocator.keep is None else allocator.keep.cpu()
    adapters = []
    for matrix, whole, kept in zip(
        allocator.matrices, allocator.full_factors(), keep.split(allocator.ranks), strict=True
    ):
        kept = kept[list(matrix.layer.triplets)]
        p, lam, qt = (whole[kind] for kind in ("P", "lam", "Qt"))
        adapters.append(
            AdapterWeights(
                matrix.name, p[:, kept].contiguous(), lam[kept], qt[:, kept].T.contiguous(), matrix.layer.scale,
                is_conv1d(matrix.layer.base),
            )
        )  # fmt: skip
    return adapters
