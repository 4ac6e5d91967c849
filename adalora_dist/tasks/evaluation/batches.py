"""What the evaluations share: the result of a task, batches that do not depend on the number of processes, gathering.

Batches are formed from the whole data set and dealt out: batch k goes to rank k modulo world size. So a batch has the
same rows and the same padding on 1 and N processes, and so have its scores, to the last bit on equal hardware. Every
rank runs the same number of forwards, since forwards of sharded models are collective: a rank that has run out of
batches repeats the last one and drops the outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn

from adalora_dist.io.progress import progress_bar
from adalora_dist.sharding.tensors import put_back_shards

Gather = Callable[[list[Any]], list[Any]]


def gather_lists(items: list[Any]) -> list[Any]:
    """The lists of all ranks, joined in rank order, on every rank; without a process group, ``items`` itself."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return items
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def dealt_batches(
    items: Sequence[Any], batch_size: int, rank: int, world_size: int, description: str
) -> Iterator[tuple[list[Any], bool]]:
    """Yield this rank's batches as (items, counts): ``counts`` is False for a repeated batch, to be run and dropped.

    Every rank gets the same number. Rank 0 shows a progress bar with the time left.
    """
    batches = [list(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]
    num_forwards = -(-len(batches) // world_size)
    for forward in progress_bar(range(num_forwards), desc=description, unit="batch", show=rank == 0):
        index = forward * world_size + rank
        yield (batches[index], True) if index < len(batches) else (batches[-1], False)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; yields the model's device and restores the mode afterwards.

    ``no_grad`` and not ``inference_mode``, whose tensors sharded modules cannot reuse in training. What FSDP2 leaves
    gathered, as no backward follows, is given up: the next forward would take a head for one that stays.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        model.train(was_training)
        put_back_shards(model)
