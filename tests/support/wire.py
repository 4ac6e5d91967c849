"""What a process puts into collectives, counted where PyTorch dispatches them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class WireBytes(TorchDispatchMode):
    """Of a gathering those bytes that are of others, of any other collective those that this process puts in."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self._world_size = world_size
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            # One side is a share of the other: of what is gathered, or of what is reduced, the whole.
            whole = max(sum(t.numel() * t.element_size() for t in _tensors(argument)) for argument in args)
            is_gathered = "gather" in func._opname
            self.num_bytes += whole * (self._world_size - 1) // self._world_size if is_gathered else whole
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
