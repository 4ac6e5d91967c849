"""Checked rows of texts on disk, for data that do not fit into memory. Never imports torch.

A table is an Arrow file in the cache, named by the hash of the files' bytes and of what is asked of them. Beside it
stands its own hash, without which it is made anew, and how many rows were left out, and why: whoever finds the table
says so again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from adalora_dist.io.cache import cache_folder
from adalora_dist.io.digest import digest_of
from adalora_dist.io.foreign_files import opened, read_object
from adalora_dist.io.mapped import release_mapped
from adalora_dist.io.publish import write_whole
from adalora_dist.tasks.rows.bad_rows import BadRows, Rows
from adalora_dist.tasks.rows.source import checked_rows, refuse_nothing

if TYPE_CHECKING:
    from datasets import Dataset

_FORMAT = 2
_CHUNK_ROWS = 1000
MAPPED = ".arrow"
"""How names of files end in which rows lie, here and in the caches of ``datasets``."""

Texts = dict[str, str]

logger = logging.getLogger(__name__)


class Split(Protocol):
    """Rows of files, or of the Hub."""

    @property
    def where(self) -> str:
        """For error messages."""

    def rows(self) -> Rows: ...

    def identity(self) -> Iterator[bytes]:
        """What the rows and their origins depend on."""


def checked_table(
    split: Split,
    columns: tuple[str, ...],
    parse: Callable[[object, str], Texts],
    bad: BadRows,
    max_rows: int | None = None,
    how: str = "",
) -> Dataset:
    """``parse(row, origin)`` of every row that can be used, texts under the names ``columns``, on disk in the cache.

    Args:
        max_rows: no rows behind so many are looked at.
        how: whatever else decides what ``parse`` makes of a row.

    Raises:
        UserError: the first row that cannot be used, unless ``bad`` leaves it out; or no row is left.
    """
    from datasets import Dataset

    path = cache_folder() / "rows" / f"{_digest(split, columns, bad.policy, max_rows, *filter(None, [how]))}.arrow"
    try:
        noted = read_object(path.with_suffix(".json"))
        left_out = {str(file): (int(count), str(reason)) for file, (count, reason) in noted["left_out"].items()}
        if _sha256(path) != noted["sha256"]:
            raise ValueError("it is not what was written")
        table = Dataset.from_file(str(path))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # none, or not what was written
        if path.exists():
            logger.warning("%s cannot be read (%s): made anew", path, error)
    else:
        for file, (count, reason) in left_out.items():
            bad.leave_out(file, count, reason)
        return table
    before, partial = bad.counts.copy(), path.with_suffix(f".{os.getpid()}.partial")
    usable = bad.usable(islice(split.rows(), max_rows), parse)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        num_rows = _write(partial, columns, usable)
        new = bad.counts - before
        if not num_rows:
            refuse_nothing(split.where, new.total(), bad)
        left_out = {file: (count, bad.reasons[file]) for file, count in new.items()}
        noted = {"left_out": left_out, "sha256": _sha256(partial)}
        partial.rename(path)
        write_whole(path.with_suffix(".json"), json.dumps(noted))
        return Dataset.from_file(str(path))
    except OSError as error:
        logger.warning("%s cannot be written (%s): rows are held in memory", path, error)
        bad.counts = before
        return Dataset.from_list(checked_rows(split.where, islice(split.rows(), max_rows), parse, bad))
    finally:
        with contextlib.suppress(OSError):  # there may be no such folder
            partial.unlink(missing_ok=True)


def chunks(rows: Dataset) -> Iterator[Any]:
    """All rows in order, some at a time, without leaving resident what has been read of mapped files."""
    for part in rows.iter(_CHUNK_ROWS):
        yield part
        release_mapped(MAPPED)


def digest_of_tokens(rows: Dataset) -> str:
    """SHA-256 of ``input_ids`` and ``labels`` of all rows, read without a list of them.

    The same for equal rows, wherever they lie and however they are cut into files.
    """
    tables = chunks(rows.select_columns(["input_ids", "labels"]).with_format("arrow"))
    return digest_of(
        column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype("<i8").tobytes()
        for table in tables
        for column in table.columns
    )


def _digest(split: Split, *asked: object) -> str:
    return digest_of([json.dumps([_FORMAT, *asked]).encode(), *split.identity()])[:32]


def _sha256(path: Path) -> str:
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, columns: tuple[str, ...], rows: Iterable[Texts]) -> int:
    """Write an Arrow stream; the number of rows."""
    import pyarrow

    schema = pyarrow.schema([(name, pyarrow.string()) for name in columns])
    num_rows = 0
    rows = iter(rows)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as stream:
        while chunk := list(islice(rows, _CHUNK_ROWS)):
            stream.write_batch(pyarrow.RecordBatch.from_pylist(chunk, schema=schema))
            num_rows += len(chunk)
    return num_rows
