"""Before anything long: does the model, under its engine, do what the settings take it to? Tried with a few tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from adalora_dist.config.sections import TrainConfig
from adalora_dist.sharding.tensors import put_back_shards
from adalora_dist.tasks.padding import unwrapped
from adalora_dist.tasks.reading_ahead import refuse_reading_ahead
from adalora_dist.tasks.token_losses import refuse_chunks


def try_forwards(model: nn.Module, train: TrainConfig, auto_class: Any, is_precise: bool) -> None:
    """Raise if a model that predicts words cannot be trained so. Forwards, collective where weights are sharded.

    Args:
        auto_class: that it was loaded by.
        is_precise: the engine computes in float32, if the model does.

    Raises:
        UserError: it reads both ways and has no encoder, or ``logits_chunk`` is a number, and its logits are changed
            behind its head.
    """
    kind = auto_class.__name__
    if kind == "AutoModelForCausalLM":
        refuse_reading_ahead(unwrapped(model), is_precise)
    if kind in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        refuse_chunks(unwrapped(model), train.logits_chunk)
    put_back_shards(model)
