"""What a forward keeps for its backward, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def kept_bytes(forward: Callable[[], Any], known: tuple[torch.Tensor, ...] = ()) -> int:
    """Bytes of all storages that autograd keeps after ``forward``, each once, without those of ``known``."""
    storages: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # so that no storage is freed and its address given to another one

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept.append(forward())
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())
