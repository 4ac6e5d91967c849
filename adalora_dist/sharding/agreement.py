"""An error of one process is raised by all of them, before any waits for the others in vain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from adalora_dist.io.errors import UserError

T = TypeVar("T")


def agreed(action: Callable[[], T], group: dist.ProcessGroup | None = None, keep: bool = True) -> Any:
    """Run ``action`` on every process; if it fails anywhere, all raise. Collective.

    Args:
        group: whose processes agree; default: all.
        keep: collect the results, which then must be plain data: numbers, texts, lists of them.

    Returns what it gave on each rank, or with ``keep`` false on this one.

    Raises:
        UserError, RuntimeError: elsewhere it failed; with that rank and its message. Here: the error itself.
    """
    result: Any = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    if world_size() == 1:
        if error is not None:
            raise error
        return [result] if keep else result
    message = None if error is None else f"{type(error).__name__}: {error}"
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, (message, result if keep else None), group=group)
    if error is not None:
        raise error
    for rank, (message, _) in enumerate(gathered):
        if message is not None:
            kind = UserError if message.startswith("UserError: ") else RuntimeError
            raise kind(f"rank {rank}: {message.removeprefix('UserError: ')}")
    return [value for _, value in gathered] if keep else result


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
