"""A tokenizer's files, as they were before it was used.

Each call of a fast tokenizer leaves the truncation and the padding that it was asked for in its backend, and saving
writes them into tokenizer.json as if they were rules: whoever loads that gets texts cut to the length of our last row.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rules = tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]
"""Truncation and padding of a backend; None: none."""


def remember_rules(tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep in a tokenizer that was just loaded the rules which its files have."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        tokenizer.rules_in_files = (backend.truncation, backend.padding)


def knows_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its vocabulary has more than special tokens, signs and spaces: something with a letter or digit.

    Bytes, as tokenizers that came with a model may have them, count as words.
    """
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    vocabulary: dict[Any, int] = tokenizer.get_vocab()
    own = (token for token, id_ in vocabulary.items() if id_ not in special)
    return any(isinstance(token, bytes) or any(map(str.isalnum, token)) for token in own)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """``save_pretrained`` with the rules that its files had when it was loaded; none where nobody remembered them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        tokenizer.save_pretrained(folder)
        return
    left = (backend.truncation, backend.padding)
    _set_rules(backend, getattr(tokenizer, "rules_in_files", (None, None)))
    try:
        tokenizer.save_pretrained(folder)
    finally:
        _set_rules(backend, left)


def _set_rules(backend: Any, rules: Rules) -> None:
    truncation, padding = rules
    if truncation is None:
        backend.no_truncation()
    else:
        backend.enable_truncation(**truncation)
    if padding is None:
        backend.no_padding()
    else:
        backend.enable_padding(**padding)
