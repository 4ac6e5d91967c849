"""What a process puts into collectives, counted where PyTorch dispatches them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class WireBytes(TorchDispatchMode):
    """Bytes by collective: of a gathering those of others, of a reduction those that this process puts in.

    Within it only what is dispatched is seen: DDP's reducer calls its group from C++.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self._world_size = world_size
        self.counted: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname.strip("_")
            sizes = [sum(t.numel() * t.element_size() for t in _tensors(argument)) for argument in args]
            num_bytes = max(sizes)  # of what is gathered, or of what is reduced: the other side is a share of it
            if "gather" in name:
                num_bytes = num_bytes * (self._world_size - 1) // self._world_size
            self.counted[name] += num_bytes
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
