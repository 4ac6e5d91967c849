"""What counts as a linear map, and how its files have the weight: asked here only."""

from __future__ import annotations

from typing import cast

from torch import nn

from adalora_dist.backbones.files import base_folder_of as base_folder_of


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear map, or None. Quantised linears derive from nn.Linear or carry its attributes."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return cast(int, module.in_features), cast(int, module.out_features)
    if hasattr(module, "nf") and hasattr(module, "nx"):  # transformers' Conv1D, weight (d_in, d_out)
        return cast(int, module.nx), cast(int, module.nf)
    return None


def is_conv1d(base: nn.Module) -> bool:
    """Whether the files have the weight as (d_in, d_out). A quantised linear remembers what it has replaced."""
    return hasattr(base, "nf") or getattr(base, "source_cls", type(base)).__name__ == "Conv1D"
