"""The rows of one file, with their origins for error messages. Never imports torch."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from adalora_dist.config.row_files import TEXT_TABLES
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import MAX_BYTES, NotReadable, loads, opened
from adalora_dist.tasks.rows.bad_rows import Rows
from adalora_dist.tasks.rows.text_tables import text_table_rows

_TABLE_ROWS = 1000
"""Of Parquet and Arrow, at a time."""
_MAX_ARRAY_BYTES = 1 << 29
"""Of a file that is one JSON array, which is parsed as a whole."""
_ARROW_FILE = b"ARROW1"
"""How the one of Arrow's two forms begins that is no stream."""


def file_rows(path: Path) -> Rows:
    """Yield (``file:row``, row) of one file, row 1 first; empty lines are left out.

    A row that cannot be read is yielded as the error that says so.

    Raises:
        UserError: the file cannot be read at all.
    """
    with readable(path):
        refuse_zeros(path)
        if path.name.endswith((".parquet", ".arrow")):
            yield from _table_rows(path)
            return
        is_array = False
        if path.name.endswith((".json", ".json.gz", ".json.zst")):
            with decompressed(path) as file:
                is_array = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
        with decompressed(path) as file:
            if path.name.endswith(TEXT_TABLES):
                yield from text_table_rows(path, file)
            else:
                yield from _array_rows(path, file) if is_array else _line_rows(path, file)


@contextmanager
def decompressed(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, without the compression that its name ends in.

    Raises:
        NotReadable: it is no plain file.
        OSError, EOFError, zlib.error: while it is read, if it is not what its name says (:func:`readable`).
    """
    with opened(path) as raw:
        if path.name.endswith(".gz"):
            with gzip.open(raw) as file:
                yield cast(BinaryIO, file)
        elif path.name.endswith(".zst"):
            import pyarrow

            with pyarrow.CompressedInputStream(raw, "zstd") as stream, io.BufferedReader(stream) as file:
                yield file
        else:
            yield raw


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Around the reading of a file.

    Raises:
        UserError: it cannot be read, or is no archive from beginning to end.
    """
    try:
        yield
    except (NotReadable, OSError, EOFError, zlib.error) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise UserError(f"{path} cannot be read ({reason}): bring it back from a copy, or write it again") from error


def refuse_zeros(path: Path) -> None:
    """Raise for what is no file of rows, before all of it is read: no plain file, or one that is not filled.

    Raises:
        UserError: a file that was made in its length and never written, 100 GB of it on no disk, or a device.
    """
    try:
        with opened(path) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes and os.lseek(file.fileno(), 0, os.SEEK_HOLE) < size_bytes:
                raise NotReadable("it has holes")
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            start = file.read(4096)
            if start and not start.strip(b"\0"):
                raise NotReadable("it begins with zeros")
    except NotReadable as error:
        raise UserError(f"{path} cannot be read ({error}): bring it back from a copy, or write it again") from None


def _line_rows(path: Path, lines: BinaryIO) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(iter(lambda: lines.readline(MAX_BYTES + 1), b""), start=1):
        origin = f"{path}:{number}"
        if len(line) > MAX_BYTES:
            raise NotReadable(f"row {number} has more than {MAX_BYTES:,} bytes")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                yield origin, loads(text)
        except json.JSONDecodeError as error:
            # Files that are written for people to read have an object over several lines.
            is_begun = text.lstrip().startswith("{") and error.pos >= len(text.rstrip())
            part = ", the line has an object's beginning alone" if is_begun else ""
            reason = f"{error.msg} at column {error.colno}{part}"
            yield origin, UserError(f"{origin}: not valid JSON ({reason}); write one JSON object per line")
        except UnicodeDecodeError as error:
            reason = f"{error.reason} at byte {error.start} of the row"
            yield origin, UserError(f"{origin}: not UTF-8 text ({reason}); save it as UTF-8")
        except (ValueError, RecursionError):  # a number of thousands of digits, brackets within brackets, too many
            yield origin, UserError(f"{origin}: no row of data; write one JSON object of texts per line")


def _array_rows(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    content = bytearray()
    while len(content) <= _MAX_ARRAY_BYTES and (block := file.read(1 << 20)):
        content += block
    if len(content) > _MAX_ARRAY_BYTES:
        raise UserError(f"{path} has more than {_MAX_ARRAY_BYTES:,} bytes in one array; write one JSON object per line")
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON ({error.msg} at line {error.lineno}); write an array of objects, or one object "
            "per line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no array of rows; write one JSON object of texts per line") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", row


def _table_rows(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow

    number = 0
    try:
        for batch in _batches(path):
            for row in _batch_rows(batch):
                number += 1
                origin = f"{path}:{number}"
                is_text = not isinstance(row, UnicodeDecodeError)
                yield origin, row if is_text else UserError(f"{origin}: not UTF-8 text ({row}); save it as UTF-8")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        form = "Parquet" if path.name.endswith(".parquet") else "Arrow"
        raise UserError(f"{path}: not a readable {form} file ({reason}); write it again") from error


def _batches(path: Path) -> Iterator[Any]:
    """Record batches of some rows each: of Parquet, of a stream of Arrow, as datasets write them, or of its files."""
    import pyarrow
    import pyarrow.parquet

    if path.name.endswith(".parquet"):
        # Not read_table, which takes a folder called name=value for a column.
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches(_TABLE_ROWS)
        return
    with opened(path) as raw:
        is_file = raw.read(len(_ARROW_FILE)) == _ARROW_FILE
        raw.seek(0)
        if is_file:
            table = pyarrow.ipc.open_file(raw)
            batches = (table.get_batch(index) for index in range(table.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(raw))
        for batch in batches:
            for first in range(0, len(batch), _TABLE_ROWS):
                yield batch.slice(first, _TABLE_ROWS)


def _batch_rows(batch: Any) -> list[Any]:
    rows: list[Any] = []
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:  # in one row or another
        for index in range(len(batch)):
            try:
                rows += batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                rows.append(error)
    return rows
