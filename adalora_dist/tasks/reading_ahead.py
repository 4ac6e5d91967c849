"""Is a language model one that writes? An encoder with such a head sees the tokens that it is to predict.

BERT, RoBERTa and others are decoders where their config.json says so, and else load as language models all the same:
their loss falls to nothing, and what they write is noise.
"""

from __future__ import annotations

import torch
from torch import nn

from adalora_dist.io.errors import UserError
from adalora_dist.sharding.tensors import class_name
from adalora_dist.tasks.evaluation.batches import evaluating
from adalora_dist.tasks.padding import is_purely_causal, unwrapped

_BEFORE, _LAST = (5, 9, 6, 11, 7), (8, 13)
_PRECISE, _ROUNDED = 1e-5, 1e-2
"""What rounding may make of it, relative to the largest logit: in float32, and in 16 bits."""


def refuse_reading_ahead(model: nn.Module, is_precise: bool) -> None:
    """Raise if what a model without encoder predicts depends on what follows. Tried where its class does not tell: one
    forward of two rows that differ in their last token alone, collective where weights are sharded.

    Args:
        is_precise: the engine computes in float32, if the model does.

    Raises:
        UserError: it does.
    """
    inner = unwrapped(model)
    if inner.config.is_encoder_decoder or is_purely_causal(model):
        return
    vocab_size = inner.config.get_text_config().vocab_size
    with evaluating(model) as device:
        ids = torch.tensor([[token % vocab_size for token in (*_BEFORE, last)] for last in _LAST], device=device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1]
    limit = _PRECISE if is_precise and logits.dtype is torch.float32 else _ROUNDED
    logits = logits.float()
    if float((logits[0] - logits[1]).abs().max()) > limit * float(logits.abs().max()):
        has_switch = getattr(inner.config, "is_decoder", None) is False
        remedy = "set is_decoder to true in its config.json, or take" if has_switch else "take"
        name = class_name(inner)
        raise UserError(
            f"{name} reads a text both ways, so it sees the tokens that it is to predict, and learns "
            f"nothing: {remedy} a model that was trained to write"
        )
