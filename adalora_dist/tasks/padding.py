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
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from adalora_dist.io.errors import UserError

_KNOWN = {"transformers", "torch", "builtins", "abc", "typing"}


def unwrapped(model: nn.Module) -> Any:
    """The model under its engine's wrapper; accelerate's own way to it imports DeepSpeed wherever that is installed."""
    while not isinstance(model, PreTrainedModel) and isinstance(inner := getattr(model, "module", None), nn.Module):
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


def is_purely_causal(model: nn.Module) -> bool:
    """Whether no token of a row sees what follows it, so that padding on the right needs no mask to hide it.

    Only where it is certain: a class of transformers itself, in which every module that says which way it attends
    (there is one at least) says causal. Cross-attention, image towers and prefixes that are read both ways say not.
    """
    inner = unwrapped(model)
    if inner not in _causal:  # asked in every micro-batch
        _causal[inner] = _says_causal(inner)
    return _causal[inner]


_causal: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _says_causal(inner: Any) -> bool:
    if not all(kind.__module__.partition(".")[0] in _KNOWN for kind in type(inner).__mro__):
        return False  # code that came with the model, or the user's
    if not hasattr(inner, "config"):
        return False
    if inner.config.is_encoder_decoder or not getattr(inner.config.get_text_config(), "is_causal", True):
        return False
    said = [module.is_causal for module in inner.modules() if hasattr(module, "is_causal")]
    return bool(said) and all(said)


def without_mask(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch padded on the right, without its ``attention_mask`` where the model does not need it.

    A mask costs operations, the host's wait for the device, which has to tell whether there is padding at all, and on
    GPUs the fastest attention kernels.
    """
    return {name: x for name, x in batch.items() if name != "attention_mask" or not is_purely_causal(model)}


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
