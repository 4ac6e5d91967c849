"""Rows as tokens."""

from __future__ import annotations

from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from adalora_dist.backbones.fit import padding_token as padding_token

IGNORED = -100  # the label that torch's cross-entropy and transformers skip


class EncodedRow(TypedDict):
    """One training sequence: two lists of equal length; a label is the token itself or ``IGNORED``."""

    input_ids: list[int]
    labels: list[int]


def eos_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """EOS as a list, empty where the tokenizer has none; generation then stops at ``max_new_tokens`` only."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
