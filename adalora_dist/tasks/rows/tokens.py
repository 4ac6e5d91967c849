"""Rows as tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypedDict

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.rows.fields import shown

if TYPE_CHECKING:
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


def refuse_no_tokens(rows: Iterable[Sequence[int]], text_of: Callable[[int], str]) -> None:
    """Raise if a text has come to nothing: some tokenizers drop what they do not know, control characters first.

    Args:
        rows: the tokens of each text.
        text_of: the text of a row, by its index.

    Raises:
        UserError: a row is empty.
    """
    for index, tokens in enumerate(rows):
        if not tokens:
            raise UserError(
                f"row {index + 1}: the text {shown(text_of(index))} has no tokens; take the tokenizer that belongs to "
                "the model, or remove the row"
            )
