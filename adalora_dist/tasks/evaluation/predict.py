"""Predictions of a classifier, dealt out over all processes; see ``batches.py`` for why they are the same on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from adalora_dist.tasks.batches import pad_columns
from adalora_dist.tasks.evaluation.batches import Gather, dealt_batches, evaluating, gather_lists
from adalora_dist.tasks.padding import padding_of

Outputs = list[tuple[torch.Tensor, ...]]
"""Of each row, what :func:`predict` was asked for."""


def predict(
    model: nn.Module,
    inputs: Sequence[Mapping[str, Sequence[int]]],
    padding_token: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    description: str = "evaluate",
    outputs: Sequence[str] = ("logits",),
    gather: Gather = gather_lists,
) -> Outputs:
    """The model's outputs for each row, float32 on the CPU, padding removed where they have a value per token.

    Every rank must call it with the same rows, runs the same number of forwards, and returns the same result, which
    depends neither on ``world_size`` nor, but for rounding, on ``batch_size``.

    Args:
        inputs: tokenised rows: the columns that the model takes besides ``attention_mask``.
        padding_token: for a model that does not say what it takes for padding.
        batch_size: rows in one forward of one rank.
        outputs: which of the model's outputs: ("logits",) of a classifier, ("start_logits", "end_logits").
    """
    # Longest first: what does not fit into memory fails at once.
    order = sorted(range(len(inputs)), key=lambda index: -len(inputs[index]["input_ids"]))
    names, padding = list(inputs[0]), padding_of(model, padding_token)
    local: list[tuple[int, tuple[torch.Tensor, ...]]] = []
    with evaluating(model) as device:
        for batch, counts in dealt_batches(order, batch_size, rank, world_size, description):
            padded = pad_columns([inputs[index] for index in batch], padding, names)
            result = model(**{name: tensor.to(device) for name, tensor in padded.items()})
            if not counts:
                continue
            values = [getattr(result, name).float().cpu() for name in outputs]
            longest = padded["input_ids"].shape[1]
            for row, index in enumerate(batch):
                length = len(inputs[index]["input_ids"])
                own = (value[row, :length] if value.shape[1:] == (longest,) else value[row] for value in values)
                local.append((index, tuple(tensor.clone() for tensor in own)))
    found = dict(gather(local))
    return [found[index] for index in range(len(inputs))]


def largest_difference(
    found: Sequence[tuple[torch.Tensor, ...]], expected: Sequence[tuple[torch.Tensor, ...]]
) -> float:
    """The largest absolute difference between two results of :func:`predict` on the same rows."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max()) for x, y in pairs for a, b in zip(x, y, strict=True))
