"""Local data: where a split lies, and its rows with their origins for error messages. Never imports torch.

A split is one file, NAME.jsonl, .json, .jsonl.gz, .json.gz or .parquet; or such files in a folder NAME; or shards
NAME-00000-of-00002.parquet. Paths are names, never patterns: whatever a folder is called, it alone is read. Tables of
text without types (.csv, .tsv) are for recipes whose fields are all texts.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from adalora_dist.config.row_files import SUFFIXES as SUFFIXES
from adalora_dist.config.row_files import TEXT_TABLES as TEXT_TABLES
from adalora_dist.config.row_files import names_file
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import MAX_BYTES, NotReadable, opened
from adalora_dist.tasks.rows.bad_rows import Rows
from adalora_dist.tasks.rows.text_tables import text_table_rows

TRAIN, TEST = ("train",), ("test", "validation", "dev")
"""Names of a split. Only the test split has stand-ins: a folder with train and dev files is common, and dev rows are
held out as well."""
_SHARD = re.compile(r"-(\d+)-of-(\d+)")
_PARQUET_ROWS = 1000
_MAX_ARRAY_BYTES = 1 << 29
"""Of a file that is one JSON array, which is parsed as a whole."""


@dataclass(frozen=True)
class LocalSplit:
    """One split in a local folder: its files in order, and which of the names asked for it has."""

    name: str
    files: tuple[Path, ...]

    @property
    def where(self) -> str:
        """For error messages: the file, or the folder of several."""
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)

    def rows(self) -> Rows:
        """The rows of all files, one after the other: see :func:`file_rows`."""
        for file in self.files:
            yield from file_rows(file)

    def identity(self) -> Iterator[bytes]:
        """What the rows and their origins depend on: the names of the files, and the SHA-256 of each."""
        for path in self.files:
            refuse_zeros(path)
            yield os.fsencode(path.absolute()) + b"\0"
            with opened(path) as file:
                yield hashlib.file_digest(file, "sha256").digest()


def task_folders(source: str, tasks: Sequence[str], aliases: Mapping[str, str] | None = None) -> dict[str, Path]:
    """The folders of tasks in ``source``, by task, in the order of ``tasks``.

    Case, dashes and underscores do not count: ARC-Easy is arc_easy, SST-2 is sst2.

    Args:
        aliases: other names, in small letters without dashes and underscores, and the task that each stands for.

    Raises:
        UserError: two folders are one task's, or ``source`` cannot be listed.
    """
    known = {_plain(task): task for task in tasks} | dict(aliases or {})
    found: dict[str, Path] = {}
    for path in _listed(Path(source)):
        task = known.get(_plain(path.name))
        if task is None or not path.is_dir():
            continue
        if task in found:
            raise UserError(f"{source}: both {found[task].name} and {path.name} hold {task}; remove one of them")
        found[task] = path
    return {task: found[task] for task in tasks if task in found}


def task_folder(source: str, task: str, tasks: Sequence[str]) -> Path:
    """Where one task's splits lie in ``source``: its folder (:func:`task_folders`), the one file that ``source`` is, or
    ``source`` itself, if that has a train split and no folder of the task; if there is none of these, its usual place.
    """
    where = Path(source)
    if names_file(source):
        return where
    found = task_folders(source, (task, *tasks)) if where.is_dir() else {}
    usual = found.get(task, where / task)
    return where if where.is_dir() and not usual.is_dir() and split_in(where, TRAIN) else usual


def find_split(folder: Path, names: Sequence[str]) -> LocalSplit:
    """The split in ``folder``: that of the first of ``names`` which is there.

    Raises:
        UserError: no such folder or split, the same name in two forms, or shards are missing.
    """
    if not folder.is_dir():
        raise UserError(f"data: no folder {folder}; it must hold {names[0]}.jsonl or {names[0]}.parquet")
    if found := split_in(folder, names):
        return found
    listed = _listed(folder)
    wanted = ", ".join(name + suffix for name in names for suffix in SUFFIXES[:2])
    others = ", ".join(SUFFIXES[2:])
    holds = ", ".join(ascii(path.name)[1:-1] for path in listed[:8]) or "nothing"
    raise UserError(
        f"{folder}: none of {wanted} exists, nor with {others}, nor a folder {names[0]} of such files (it holds "
        f"{holds}{', ...' if len(listed) > 8 else ''}); put the split there under one of these names"
    )


def split_in(folder: Path, names: Sequence[str], suffixes: Sequence[str] = SUFFIXES) -> LocalSplit | None:
    """As :func:`find_split`, of files with these suffixes; None where there is no such split."""
    listed = _listed(folder)
    for name in names:
        if files := _files_of(folder, name, listed, suffixes):
            return LocalSplit(name, tuple(files))
    return None


def data_files(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """All files of rows that lie in a folder itself, by name.

    Raises:
        UserError: it cannot be listed.
    """
    return [path for path in _listed(folder) if path.is_file() and path.name.endswith(tuple(suffixes))]


def file_rows(path: Path) -> Rows:
    """Yield (``file:row``, row) of one file, row 1 first; empty lines are left out.

    A row that cannot be read is yielded as the error that says so.

    Raises:
        UserError: the file cannot be read at all.
    """
    with readable(path):
        refuse_zeros(path)
        if path.name.endswith(".parquet"):
            yield from _parquet_rows(path)
            return
        with opened(path) as raw:
            file = cast(BinaryIO, gzip.open(raw)) if path.name.endswith(".gz") else raw
            if path.name.endswith(TEXT_TABLES):
                yield from text_table_rows(path, file)
                return
            start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
            is_array = path.name.removesuffix(".gz").endswith(".json") and start.startswith(b"[")
            file.seek(0)
            yield from _array_rows(path, file) if is_array else _line_rows(path, file)


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


def _listed(folder: Path) -> list[Path]:
    """What is in a folder, sorted by name, without what systems hide there (.DS_Store, _SUCCESS)."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
    except OSError as error:
        raise UserError(f"data: {folder} cannot be listed ({error.strerror}); let it be read") from error


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def _files_of(folder: Path, name: str, listed: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    forms = [[path] for suffix in suffixes if (path := folder / (name + suffix)).is_file()]
    if (folder / name).is_dir():
        files = [path for path in _listed(folder / name) if path.is_file()]
        forms += [[file for file in files if file.name.endswith(suffix)] for suffix in suffixes]
    for suffix in suffixes:
        if shards := _shards(name, suffix, listed):
            forms.append(shards)
    forms = [files for files in forms if files]
    if len(forms) > 1:
        first, second = (files[0].relative_to(folder) for files in forms[:2])
        raise UserError(f"{folder}: both {first} and {second} exist; remove one of them")
    return forms[0] if forms else []


def _shards(name: str, suffix: str, listed: Sequence[Path]) -> list[Path]:
    """NAME-00000-of-00002 and the next, in order."""
    found: dict[int, Path] = {}
    total = 0
    for path in listed:
        if not (path.name.startswith(name) and path.name.endswith(suffix) and path.is_file()):
            continue
        if shard := _SHARD.fullmatch(path.name[len(name) : -len(suffix)]):
            found[int(shard[1])] = path
            total = max(total, int(shard[2]))
    missing = [number for number in range(total) if number not in found]
    if missing or len(found) > total:
        some = next(iter(found.values()))
        raise UserError(
            f"{some}: of its {total} shards {len(found)} are there, number {missing[0] if missing else total} is "
            "missing; fetch all of them"
        )
    return [found[number] for number in range(total)]


def _line_rows(path: Path, lines: BinaryIO) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(iter(lambda: lines.readline(MAX_BYTES + 1), b""), start=1):
        origin = f"{path}:{number}"
        if len(line) > MAX_BYTES:
            raise NotReadable(f"row {number} has more than {MAX_BYTES:,} bytes")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                yield origin, json.loads(text)
        except json.JSONDecodeError as error:
            yield (
                origin,
                UserError(
                    f"{origin}: not valid JSON ({error.msg} at column {error.colno}); write one JSON object per line"
                ),
            )
        except UnicodeDecodeError as error:
            reason = f"{error.reason} at byte {error.start} of the row"
            yield origin, UserError(f"{origin}: not UTF-8 text ({reason}); save it as UTF-8")
        except (ValueError, RecursionError):  # a number of thousands of digits, brackets within brackets
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


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # Not read_table, which takes a folder called name=value for a column.
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_ROWS):
                for row in _batch_rows(batch):
                    number += 1
                    origin = f"{path}:{number}"
                    is_text = not isinstance(row, UnicodeDecodeError)
                    yield origin, row if is_text else UserError(f"{origin}: not UTF-8 text ({row}); save it as UTF-8")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a readable Parquet file ({reason}); write it again") from error


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
