"""Padding that a model does not see: its outputs for a row are the same alone and in any batch.

Attention masks hide padding from attention. Classifiers see it once more, where they look for the token to judge by:

- Decoders take the last token that is not ``config.pad_token_id``: batches are padded with that id and no other. Where
  a tokenizer pads with EOS and also ends texts with it, that is the token before EOS: in training, in evaluation, and
  in whatever loads the exported model, batched or not.
- Encoder-decoders (BART, T5) take the last EOS of a row and want equally many in all rows: batches are never padded
  with EOS, and texts that spell it out are refused before the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from adalora_dist.io.errors import UserError


def unwrapped(model: nn.Module) -> Any:
    """The model under its engine's wrapper."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return cast(Any, model)


def padding_of(model: nn.Module, token: int) -> int:
    """The id to pad ``input_ids`` with: what the model takes for padding, else ``token``, the tokenizer's."""
    config = getattr(unwrapped(model), "config", None)
    if config is None:
        return token
    text = config.get_text_config()
    own, vocab_size = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if own is not None and own >= 0 and (vocab_size is None or own < vocab_size):
        token = own
    if config.is_encoder_decoder and token == config.eos_token_id:
        token = int(token == 0)  # any other: the mask hides it
    return token


def refuse_uneven_ends(model: nn.Module, inputs: Mapping[str, Sequence[Mapping[str, Sequence[int]]]]) -> None:
    """Raise if an encoder-decoder would not find the token to classify a row by.

    Args:
        inputs: tokenised rows, by the name of their set.

    Raises:
        UserError: rows have different numbers of EOS, or none.
    """
    inner = unwrapped(model)
    if not (inner.config.is_encoder_decoder and type(inner).__name__.endswith("ForSequenceClassification")):
        return
    eos, expected = inner.config.eos_token_id, None
    for name, rows in inputs.items():
        for number, row in enumerate(rows, start=1):
            count = list(row["input_ids"]).count(eos)
            expected = count if expected is None else expected
            if not count or count != expected:
                raise UserError(
                    f"row {number} of {name} has {count} tokens EOS (id {eos}), by which a {type(inner).__name__} "
                    f"classifies; every row must have as many, at least 1 (the first has {expected}): take the "
                    "tokenizer that belongs to the model, and EOS out of the texts"
                )
