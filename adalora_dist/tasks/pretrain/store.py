"""Tokens on disk, mapped into memory: written once while text streams by, then read in windows of a fixed length.

A store is a folder of the cache, named by the hash of the text, the tokenizer and the settings that it was made from:
train.bin and eval.bin, the tokens of all documents one after the other, each followed by EOS; index.json says how many.
It appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, overload

import numpy as np

from adalora_dist.io.digest import digest_of
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import read_object
from adalora_dist.io.progress import progress_bar
from adalora_dist.tasks.demo_models.built_once import built_once
from adalora_dist.tasks.pretrain.config import PretrainDataConfig
from adalora_dist.tasks.pretrain.documents import Source, documents, sources_of
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.token_cache import rules_of
from adalora_dist.tasks.rows.tokens import EncodedRow, eos_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VERSION = 2
_CHUNK_CHARACTERS = 1 << 20
"""Text that is tokenised at a time."""
_INDEX = "index.json"


class Windows(Sequence[EncodedRow]):
    """Tokens of a file in windows of ``length``; window k begins at token k * length. Rows are read when asked for."""

    def __init__(self, path: Path, dtype: str, num_tokens: int, length: int) -> None:
        self.length = length
        self._tokens = np.memmap(path, dtype=dtype, mode="r", shape=(num_tokens,)) if num_tokens else np.zeros(0)

    def __len__(self) -> int:
        return len(self._tokens) // self.length

    @overload
    def __getitem__(self, index: int) -> EncodedRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[EncodedRow]: ...
    def __getitem__(self, index: int | slice) -> EncodedRow | Sequence[EncodedRow]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        tokens = self._tokens[index * self.length : (index + 1) * self.length].tolist()
        return {"input_ids": tokens, "labels": tokens}


class TokenStore(NamedTuple):
    train: Windows
    held_out: Windows
    content: str
    """SHA-256 of the tokens to train on: the same wherever the files lie, and whatever is validated on."""


def token_store(
    data: PretrainDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRows,
    max_train_tokens: int | None = None,
    show: bool = True,
) -> TokenStore:
    """The store of this text, made if it is not there.

    Args:
        bad: what happens to rows without a text; those of a store that is there count as well.
        max_train_tokens: of a text without end, where to end; of files all is taken.
        show: a progress bar.

    Raises:
        UserError: a row cannot be used, there is not enough text for one sequence on either side, or the cache cannot
            be written.
    """
    train, held_out = sources_of(data)
    limit = max_train_tokens if "c4" in data.source else None
    described = [
        *(_VERSION, data.column, data.held_out_share, data.max_eval_tokens, data.max_length, limit, bad.policy),
        *(type(tokenizer).__name__, rules_of(tokenizer), eos_tokens(tokenizer)),
    ]
    key = [json.dumps(described).encode(), *train.identity(), b"|", *(held_out.identity() if held_out else ())]

    def build(folder: Path, scratch: Path) -> None:
        folder.mkdir()
        _build(folder, train, held_out, data, tokenizer, bad, limit, show)

    folder = built_once(f"pretrain-{digest_of(key)[:32]}", build, "store of tokens", lambda f: (f / _INDEX).is_file())
    index = read_object(folder / _INDEX)
    for file, (count, reason) in index["left_out"].items():
        if file not in bad.counts:
            bad.leave_out(file, count, reason)
    sides = [Windows(folder / f"{side}.bin", index["dtype"], index[side], data.max_length) for side in _SIDES]
    for side, windows in zip(_SIDES, sides, strict=True):
        if not len(windows):
            share = ", a larger --eval-share" if side == "eval" and held_out is None else ""
            raise UserError(
                f"data: {index[side]} tokens to {_SIDES[side]}, not one sequence of max_length={data.max_length}: give "
                f"more text{share}, or a smaller --max-length"
            )
    return TokenStore(sides[0], sides[1], index["content"])


_SIDES = {"train": "train on", "eval": "validate on"}


def _build(
    folder: Path,
    train: Source,
    held_out: Source | None,
    data: PretrainDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRows,
    limit: int | None,
    show: bool,
) -> None:
    dtype, eos = "uint16" if len(tokenizer) <= 1 << 16 else "uint32", eos_tokens(tokenizer)
    content = hashlib.sha256()
    counts, share = dict.fromkeys(_SIDES, 0), data.held_out_share if held_out is None else 0.0
    with (
        (folder / "train.bin").open("wb") as train_file,
        (folder / "eval.bin").open("wb") as eval_file,
        progress_bar(desc="tokenise", unit="token", unit_scale=True, show=show) as bar,
    ):
        files: dict[str, BinaryIO] = {"train": train_file, "eval": eval_file}

        def write(side: str, texts: list[str], most: int | None) -> None:
            for tokens in tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ():
                room = None if most is None else most - counts[side]
                array = np.array([*tokens, *eos][:room], dtype=dtype)
                files[side].write(array.tobytes())
                if side == "train":
                    content.update(array.tobytes())
                counts[side] += len(array)
                bar.update(len(array))

        for texts in _chunks(documents(train, data.column, bad)):
            aside = [share > 0 and _is_held_out(text, share) for text in texts]
            write("eval", [t for t, held in zip(texts, aside, strict=True) if held], data.max_eval_tokens)
            write("train", [t for t, held in zip(texts, aside, strict=True) if not held], limit)
            if limit is not None and counts["train"] >= limit:
                break
        for texts in _chunks(documents(held_out, data.column, bad)) if held_out is not None else ():
            write("eval", texts, data.max_eval_tokens)
            if counts["eval"] >= data.max_eval_tokens:
                break
    left_out = {file: [count, bad.reasons[file]] for file, count in bad.counts.items()}
    index = {"version": _VERSION, "dtype": dtype, **counts, "content": content.hexdigest(), "left_out": left_out}
    (folder / _INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk, length = [], 0
    for text in texts:
        chunk.append(text)
        length += len(text)
        if length >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, length = [], 0
    if chunk:
        yield chunk


def _is_held_out(text: str, share: float) -> bool:
    """By the content: equal documents are on one side, and stay there when others are added."""
    return int(digest_of([text.encode()])[:8], 16) < share * 2**32
