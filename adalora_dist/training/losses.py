"""What the shared loop minimises: per kind of model one function from a micro-batch's rows to a sum of losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from adalora_dist.data.batches import collate
from adalora_dist.data.encoding import IGNORED, EncodedRow

LossSum = Callable[[nn.Module, list[int]], torch.Tensor]
"""(model, row indices of one micro-batch) -> sum of the losses of their targets, float32, with gradient.

Without rows it still runs the model, because a forward may be collective, and gives 0.
"""


def causal_loss(rows: Sequence[EncodedRow], padding_token: int, device: torch.device) -> LossSum:
    """Next-token losses over the target tokens of ``rows``.

    Logits are made only for positions at which some row has a target: the vocabulary is often the widest matrix.
    """

    def loss_sum(model: nn.Module, indices: list[int]) -> torch.Tensor:
        batch = collate([rows[i] for i in indices], padding_token)
        targets = batch["labels"][:, 1:]
        positions = (targets != IGNORED).any(dim=0).nonzero().flatten()
        if not len(positions):
            positions = torch.zeros(1, dtype=torch.long)
        logits = model(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            logits_to_keep=positions.to(device),
        ).logits
        return nn.functional.cross_entropy(
            logits.flatten(0, 1).float(),
            targets[:, positions].flatten().to(device),
            ignore_index=IGNORED,
            reduction="sum",
        )

    return loss_sum
