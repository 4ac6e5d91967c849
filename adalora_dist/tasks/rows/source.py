"""From a source of data to checked rows: what the tasks share. Never imports torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.rows.bad_rows import BadRows, Rows
from adalora_dist.tasks.rows.files import TEST, LocalSplit, find_split

T = TypeVar("T")

logger = logging.getLogger(__name__)


def local_split(folder: Path, names: Sequence[str]) -> LocalSplit:
    """:func:`~adalora_dist.tasks.rows.files.find_split`, with a warning where another split stands in for test."""
    split = find_split(folder, names)
    if names == TEST and split.name != names[0]:
        logger.warning("%s has no test file: evaluating on %s", folder, split.files[0].relative_to(folder))
    return split


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
        refuse_nothing(where, bad.counts.total() - left_out)
    return usable


def refuse_nothing(where: str, num_left_out: int) -> None:
    """Raise for data without a row.

    Raises:
        UserError: always; it says whether there were rows that could not be used.
    """
    if num_left_out:
        raise UserError(f"{where}: the file has no usable rows ({num_left_out:,} left out); correct them")
    raise UserError(f"{where} cannot be read: it has no rows; it needs at least one")
