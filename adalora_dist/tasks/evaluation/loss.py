"""The loss on rows that are not trained on, dealt out over all processes; see ``batches.py`` for why it is the same."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from adalora_dist.tasks.batches import count_targets
from adalora_dist.tasks.evaluation.batches import Gather, dealt_batches, evaluating, gather_lists
from adalora_dist.tasks.losses import LossSum
from adalora_dist.tasks.rows.tokens import EncodedRow


def counts_of(rows: Sequence[EncodedRow]) -> tuple[list[int], list[int]]:
    """(tokens, target tokens) of each row, as :func:`validation_loss` takes them."""
    return [len(row["input_ids"]) for row in rows], [count_targets(row["labels"]) for row in rows]


def validation_loss(
    model: nn.Module,
    loss_sum: LossSum,
    lengths: Sequence[int],
    num_targets: Sequence[int],
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather = gather_lists,
) -> dict[str, float]:
    """``loss``, the mean over all target tokens of all rows, and ``perplexity``, e to its power; no rows: {}.

    Every rank must call it with the same rows, runs the same number of forwards and returns the same numbers, which do
    not depend on ``world_size``.

    Args:
        loss_sum: of the rows by index.
        lengths: tokens of each row.
        num_targets: target tokens of each row.
        batch_size: rows in one forward of one rank.
    """
    if not lengths:
        return {}
    # Longest first: what does not fit into memory fails at once.
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    local: list[float] = []
    with evaluating(model):
        for indices, counts in dealt_batches(order, batch_size, rank, world_size, "validation loss"):
            loss = float(loss_sum(model, indices))
            if counts:
                local.append(loss)
    loss = math.fsum(gather(local)) / sum(num_targets)  # fsum: in whatever order ranks are joined
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
