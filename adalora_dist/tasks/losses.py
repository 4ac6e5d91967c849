"""What the shared loop minimises: per kind of model one function from a micro-batch's rows to a sum of losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.batches import collate, collate_pairs, pad_columns
from adalora_dist.tasks.packing import is_flat, pack
from adalora_dist.tasks.padding import padding_of, without_mask
from adalora_dist.tasks.rows.tokens import IGNORED, EncodedRow
from adalora_dist.tasks.token_losses import LogitsChunk, TokenLosses

LossSum = Callable[[nn.Module, list[int]], torch.Tensor]
"""(model, row indices of one micro-batch) -> sum of the losses of their targets, float32, with gradient.

Without rows it still runs the model, because a forward may be collective, and gives 0.
"""


def causal_loss(
    rows: Sequence[EncodedRow],
    padding_token: int,
    device: torch.device,
    logits_chunk: LogitsChunk = "auto",
    packed: bool = False,
) -> LossSum:
    """Next-token losses over the target tokens of ``rows``.

    Logits are made only for positions that have a target, and of not too many at a time: see ``token_losses.py``.

    Args:
        packed: put rows into one sequence where there would be padding; see ``packing.py`` for the models that can.
    """
    losses = TokenLosses(logits_chunk)

    def loss_sum(model: nn.Module, indices: list[int]) -> torch.Tensor:
        chosen: list[EncodedRow] = [rows[i] for i in indices]
        batch = pack(chosen, padding_token, is_flat(model)) if packed and chosen else collate(chosen, padding_token)
        targets = batch.pop("labels")[:, 1:]
        # Only to help models that do not call their head (token_losses.py): the others pick the targets themselves.
        positions = (targets != IGNORED).any(dim=0).nonzero().flatten()
        if not len(positions):
            positions = torch.zeros(1, dtype=torch.long)
        inputs = {**without_mask(model, batch), "logits_to_keep": positions}
        return losses(model, {name: x.to(device) for name, x in inputs.items()}, targets[:, positions])

    return loss_sum


def classification_loss(
    inputs: Sequence[Mapping[str, Sequence[int]]],
    labels: Sequence[float],
    num_labels: int,
    padding_token: int,
    device: torch.device,
) -> LossSum:
    """Cross-entropy of each row's class; with one label the squared error of a number (regression).

    Args:
        inputs: tokenised rows, the columns that the model takes besides ``attention_mask``.
        padding_token: for a model that does not say what it takes for padding.
    """

    def loss_sum(model: nn.Module, indices: list[int]) -> torch.Tensor:
        logits: torch.Tensor = _output(model, inputs, indices, padding_token, device).logits.float()
        targets = torch.tensor([labels[i] for i in indices], device=device)
        if not indices:
            return logits.sum() * 0
        if num_labels == 1:
            return nn.functional.mse_loss(logits.squeeze(-1), targets, reduction="sum")
        return nn.functional.cross_entropy(logits, targets.long(), reduction="sum")

    return loss_sum


def span_loss(
    inputs: Sequence[Mapping[str, Sequence[int]]],
    spans: Sequence[tuple[int, int]],
    padding_token: int,
    device: torch.device,
) -> LossSum:
    """Of each window the mean of the cross-entropies of its answer's first and last token; (0, 0): no answer in it."""

    def loss_sum(model: nn.Module, indices: list[int]) -> torch.Tensor:
        output = _output(model, inputs, indices, padding_token, device)
        starts: torch.Tensor = output.start_logits.float()
        ends: torch.Tensor = output.end_logits.float()
        if not indices:
            return (starts.sum() + ends.sum()) * 0
        lengths = torch.tensor([[len(inputs[i]["input_ids"])] for i in indices], device=device)
        is_padding = torch.arange(starts.shape[1], device=device) >= lengths
        targets = torch.tensor([spans[i] for i in indices], device=device)
        losses = [
            # Padding takes no part, so that the loss does not depend on how batches are cut.
            nn.functional.cross_entropy(logits.masked_fill(is_padding, -math.inf), targets[:, k], reduction="sum")
            for k, logits in enumerate((starts, ends))
        ]
        return (losses[0] + losses[1]) / 2

    return loss_sum


def seq2seq_loss(
    rows: Any, padding_token: int, start_token: int, device: torch.device, logits_chunk: LogitsChunk = "auto"
) -> LossSum:
    """Losses of an encoder-decoder over all labels of ``rows``, with no logits for padding.

    Args:
        rows: indexed by row number, each with input_ids (source) and labels (target).
        start_token: the decoder reads it first, and then each label but the last (``decoder_start_token_id``).
    """
    losses = TokenLosses(logits_chunk)

    def loss_sum(model: nn.Module, indices: list[int]) -> torch.Tensor:
        batch = collate_pairs([rows[i] for i in indices], padding_token)
        labels = batch.pop("labels")
        batch["decoder_input_ids"] = decoder_inputs(labels, padding_token, start_token)
        return losses(model, {name: x.to(device) for name, x in batch.items()}, labels)

    return loss_sum


def decoder_inputs(labels: torch.Tensor, padding_token: int, start_token: int) -> torch.Tensor:
    """Labels [rows, targets] moved one to the right behind ``start_token``. Padding follows all targets: no mask."""
    shifted = labels.roll(1, dims=1)
    shifted[:, 0] = start_token
    return shifted.masked_fill(shifted == IGNORED, padding_token)


def decoder_start_token(model: nn.Module) -> int:
    """What an encoder-decoder reads before the first label.

    Raises:
        UserError: its configuration does not say, or the model has one side, as some of ``AutoModelForSeq2SeqLM`` have.
    """
    config = cast(Any, model).config
    if not config.is_encoder_decoder:
        raise UserError(
            f"{type(model).__name__} has no encoder for the text that is to be summarised: take an encoder-decoder, as "
            "BART and T5 are"
        )
    token: int | None = getattr(config, "decoder_start_token_id", None)
    if token is None:
        raise UserError(
            f"model: config.json of this {type(model).__name__} has no decoder_start_token_id; give the one it was "
            "trained with"
        )
    return token


def _output(
    model: nn.Module,
    inputs: Sequence[Mapping[str, Sequence[int]]],
    indices: Sequence[int],
    padding_token: int,
    device: torch.device,
) -> Any:
    """Of the rows ``indices``; without any, of the first row, since some models want what every real row has (EOS)."""
    rows = [inputs[index] for index in indices or (0,)]
    batch = pad_columns(rows, padding_of(model, padding_token), list(inputs[0]))
    return model(**{name: tensor.to(device) for name, tensor in batch.items()})
