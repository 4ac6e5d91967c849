"""Tokenised data sets, kept on disk: a file per data set, named by the hash of all that it was made from.

So a changed row, tokenizer or setting makes a new file, and no file is ever stale. Files are NumPy archives of integers
(no pickle) behind their own SHA-256, published by rename: processes that build the same one at once do not disturb each
other, and one of which a disk has changed a bit is made anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from adalora_dist.io.cache import cache_folder
from adalora_dist.io.collector import no_collection
from adalora_dist.io.digest import digest_of
from adalora_dist.io.foreign_files import NotReadable, opened
from adalora_dist.io.progress import progress_bar
from adalora_dist.io.publish import new_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Columns = dict[str, list[list[int]]]
"""By column, one list of integers for each row."""

CHUNK_ROWS = 1000
_FORMAT = 2
_BLOCK_BYTES = 1 << 22
_ZIP_START, _ZIP_END, _ZIP_END_BYTES = b"PK\x03\x04", b"PK\x05\x06", 22

logger = logging.getLogger(__name__)


def cached_columns(
    items: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    encode: Callable[[Sequence[Any]], Columns],
    description: str,
    show_progress: bool = True,
) -> Columns:
    """``encode`` of all items in chunks, from the cache if it is there.

    Args:
        items: rows, of what JSON can write.
        tokenizer: what ``encode`` uses; its vocabulary and rules count in the name.
        settings: whatever else decides the result, such as the longest sequence.
        encode: from up to ``CHUNK_ROWS`` items to columns; it may make more or fewer rows than it is given.
        description: of the progress bar.
    """
    folder = cache_folder() / "tokens"
    path = folder / f"{_digest(items, tokenizer, settings)}.npz"
    if os.path.lexists(path):
        try:
            return _read(path)
        except NotReadable as reason:
            logger.warning("%s cannot be read (%s): made anew", path, reason)
    columns: Columns = {}
    with progress_bar(total=len(items), desc=description, unit="row", show=show_progress) as bar:
        for start in range(0, len(items), CHUNK_ROWS):
            chunk = items[start : start + CHUNK_ROWS]
            for name, rows in encode(chunk).items():
                columns.setdefault(name, []).extend(rows)
            bar.update(len(chunk))
    try:
        _write(path, columns)
    except OSError as error:
        logger.warning("%s cannot be written (%s): the next run will tokenise again", path, error)
    return columns


def rules_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """All that decides which tokens a text has, as JSON; without what the last call of it asked for."""
    # Which token is EOS, which end of a text is cut and which columns there are is none of the backend's business.
    own = {
        "special": tokenizer.special_tokens_map,
        "truncation_side": tokenizer.truncation_side,
        "columns": list(tokenizer.model_input_names),
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # nothing else says all, the scores of SentencePiece's pieces for instance
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = {file.name: digest_of([file.read_bytes()]) for file in sorted(Path(folder).iterdir())}
        return {"files": files} | own
    return json.loads(backend.to_str()) | {"truncation": None, "padding": None} | own


def _digest(items: Sequence[Any], tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]) -> str:
    described = [_FORMAT, type(tokenizer).__name__, rules_of(tokenizer)]
    parts = chain([described, sorted(settings.items())], items)
    return digest_of(json.dumps(part).encode() + b"\n" for part in parts)[:32]


def _write(path: Path, columns: Columns) -> None:
    arrays: dict[str, Any] = {}
    for name, rows in columns.items():
        arrays[f"{name}.lengths"] = np.array([len(row) for row in rows], dtype=np.int64)
        arrays[f"{name}.values"] = np.array([value for row in rows for value in row], dtype=np.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    archive = io.BytesIO()
    np.savez_compressed(archive, **arrays)
    content = archive.getbuffer()
    with new_file(path) as file:
        file.write(hashlib.sha256(content).digest())
        file.write(content)


def _read(path: Path) -> Columns:
    """What :func:`_write` wrote, to the last bit.

    Raises:
        NotReadable: anything else.
    """
    digest = hashlib.sha256()
    with opened(path) as file:
        expected = file.read(digest.digest_size)
        ends = file.read(len(_ZIP_START))
        file.seek(-min(_ZIP_END_BYTES, os.fstat(file.fileno()).st_size), os.SEEK_END)
        ends += file.read(len(_ZIP_END))
        if ends != _ZIP_START + _ZIP_END:  # before 100 GB of something else are read
            raise NotReadable("it is no archive")
        file.seek(len(expected))
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
        if digest.digest() != expected:
            raise NotReadable("it is not what was written: its SHA-256 differs")
        file.seek(len(expected))
        return _columns_in(file)


def _columns_in(file: BinaryIO) -> Columns:
    with np.load(file, allow_pickle=False) as arrays, no_collection():
        names = [key.removesuffix(".lengths") for key in arrays.files if key.endswith(".lengths")]
        return {name: list(_rows(arrays[f"{name}.lengths"], arrays[f"{name}.values"])) for name in names}


def _rows(lengths: np.ndarray, values: np.ndarray) -> Iterator[list[int]]:
    ends = np.cumsum(lengths)
    flat = values.tolist()
    for length, end in zip(lengths.tolist(), ends.tolist(), strict=True):
        yield flat[end - length : end]
