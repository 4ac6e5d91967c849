"""Local data: JSON lines or Parquet, every row with its origin for error messages. Never imports torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adalora_dist.io.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".parquet")


def find_data_file(folder: Path, names: Sequence[str]) -> Path:
    """The file of a split in ``folder``: the first of ``names`` that exists with a legal suffix.

    Raises:
        UserError: no such folder or file, or the same name with two suffixes.
    """
    if not folder.is_dir():
        raise UserError(f"data: no folder {folder}; it must hold {names[0]}.jsonl or {names[0]}.parquet")
    for name in names:
        found = [path for suffix in SUFFIXES if (path := folder / (name + suffix)).is_file()]
        if len(found) > 1:
            raise UserError(f"{folder}: both {found[0].name} and {found[1].name} exist; remove one of them")
        if found:
            return found[0]
    wanted = ", ".join(name + suffix for name in names for suffix in SUFFIXES)
    raise UserError(f"{folder}: none of {wanted} exists; put the split there under one of these names")


def file_rows(path: Path) -> Iterator[tuple[str, object] | UserError]:
    """Yield (``file:row``, row) of a .jsonl or .parquet file, row 1 first; empty lines are left out.

    A line that is not JSON is yielded as the error that says so.

    Raises:
        UserError: the file cannot be read at all.
    """
    return _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path)


def read_table(path: Path) -> Dataset:
    """All rows of a JSON Lines or Parquet file, on disk in the cache of ``datasets``.

    Raises:
        UserError: the file cannot be read, or is empty.
    """
    import datasets

    kind = "json" if path.suffix == ".jsonl" else "parquet"
    try:
        rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        rows.data.validate(full=True)  # or text that is not UTF-8 would be found when it is used
        return rows
    except Exception as error:  # of many kinds: from the file system, pyarrow, and datasets itself
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(
            f"{path} cannot be read ({reason}): write one JSON object with the same fields per line, or Parquet"
        ) from error


def _jsonl_rows(path: Path) -> Iterator[tuple[str, object] | UserError]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield f"{path}:{number}", json.loads(text)
            except json.JSONDecodeError as error:
                yield UserError(
                    f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno}); "
                    "write one JSON object per line"
                )
            except UnicodeDecodeError as error:
                yield UserError(
                    f"{path}:{number}: not UTF-8 text ({error.reason} at byte {error.start} of the row); save it as "
                    "UTF-8"
                )
            except (ValueError, RecursionError):  # a number of thousands of digits, brackets within brackets
                yield UserError(f"{path}:{number}: no row of data; write one JSON object of texts per line")


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable Parquet file ({reason}); write it again") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", row
