"""From a source of data to checked rows: what the tasks share. Never imports torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from adalora_dist.config.row_files import names_file
from adalora_dist.io.errors import UserError
from adalora_dist.tasks.rows.bad_rows import BadRows, Rows
from adalora_dist.tasks.rows.fields import names_of, object_row
from adalora_dist.tasks.rows.files import TEST, TRAIN, LocalSplit, find_split

T = TypeVar("T")

logger = logging.getLogger(__name__)


def local_split(folder: Path, names: Sequence[str]) -> LocalSplit:
    """:func:`~adalora_dist.tasks.rows.files.find_split`, with a warning where another split stands in for test."""
    split = find_split(folder, names)
    if names == TEST and split.name != names[0]:
        logger.warning("%s has no test file: evaluating on %s", folder, split.files[0].relative_to(folder))
    return split


def split_of(where: Path, split: str, test: Sequence[str] = TEST) -> LocalSplit:
    """A split of a task: ``train``, ``test``, or what ``eval_split`` names, a file or another split.

    Args:
        where: the folder of the splits; or the one file of training rows, in whose folder others may lie.
        test: the names of the split ``test``, the first that is there counts.

    Raises:
        UserError: there is no such file, folder or split.
    """
    if names_file(split):
        return _file(Path(split), "eval_split")
    if names_file(str(where)):
        return _file(where, "data") if split == "train" else find_split(where.parent, (split,))
    if split in ("train", "test"):
        return local_split(where, TRAIN if split == "train" else test)
    return find_split(where, (split,))


def built_in(split: str) -> Literal["train", "test"]:
    """A split of built-in data.

    Raises:
        UserError: ``eval_split`` names another one.
    """
    if split not in ("train", "test"):
        raise UserError(f"eval_split={split}: the built-in data have train and test; leave it out")
    return "train" if split == "train" else "test"


def _file(path: Path, setting: str) -> LocalSplit:
    if not path.is_file():
        raise UserError(f"{setting}={path}: no such file; give one, or a folder of splits")
    return LocalSplit(path.name, (path,))


def renaming(parse: Callable[[object, str], T], column_of: Mapping[str, str]) -> Callable[[object, str], T]:
    """``parse`` of rows in which columns have other names.

    Args:
        column_of: the column that has a field's content, by field.
    """
    if not column_of:
        return parse

    def renamed(row: object, origin: str) -> T:
        row = object_row(row, origin, tuple(column_of.values()))
        for field, column in column_of.items():
            if column not in row:
                raise UserError(f"{origin}: no column {column}, which columns gives to {field}; it has {names_of(row)}")
        return parse({**row, **{field: row[column] for field, column in column_of.items()}}, origin)

    return renamed


def checked_rows(where: str, rows: Rows, parse: Callable[[object, str], T], bad: BadRows) -> list[T]:
    """``parse(row, origin)`` of every row that can be used; there is at least one.

    Args:
        where: the rows are from, for the error.

    Raises:
        UserError: the first row that cannot be used, unless ``bad`` leaves it out; or no row is left.
    """
    left_out = bad.counts.total()
    usable = list(bad.usable(rows, parse))
    if not usable:
        refuse_nothing(where, bad.counts.total() - left_out, bad)
    return usable


def refuse_nothing(where: str, num_left_out: int, bad: BadRows) -> None:
    """Raise for data without a row.

    Raises:
        UserError: always; it says whether there were rows that could not be used, and what was wrong with one.
    """
    if num_left_out:
        reason = next(reversed(bad.reasons.values()))
        raise UserError(f"{where}: the file has no usable rows ({num_left_out:,} left out); correct them: {reason}")
    raise UserError(f"{where} cannot be read: it has no rows; it needs at least one")
