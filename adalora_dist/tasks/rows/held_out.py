"""Which rows are held out for evaluations while training: by a hash of their content. Never imports torch.

So equal rows are on one side, and a row stays on its side when others are added (but for the few at the border).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np

from adalora_dist.config.sections import DataConfig
from adalora_dist.io.digest import digest_of
from adalora_dist.io.errors import UserError

DEFAULT_SHARE = 0.05

T = TypeVar("T")


def keys_of(contents: Iterable[str], count: int) -> np.ndarray:
    """64 bits of the hash of each content."""
    digests = (digest_of([content.encode()]) for content in contents)
    return np.fromiter((int(digest[:16], 16) for digest in digests), dtype=np.uint64, count=count)


def border(keys: np.ndarray, share: float | None, most: int | None) -> int:
    """The largest key whose row is held out; -1: none is.

    Args:
        share: of the rows, at least one of them; None: the default; 0: no row.
        most: rows that are held out, but for equal ones.

    Raises:
        UserError: the share would be all of the rows, or cannot be told from the rest, as all are equal.
    """
    share = DEFAULT_SHARE if share is None else share
    every = np.sort(keys)
    count = min(round(share * len(every)) or 1, len(every) if most is None else most, len(every)) if share else 0
    if not count:
        return -1
    if every[count - 1] == every[-1]:
        raise UserError(
            f"data: {len(every)} usable rows, of which a share of {share:g} cannot be held out for validation; give "
            "more rows that differ, --eval-split, or --eval-share 0"
        )
    return int(every[count - 1])


def validation_of(
    data: DataConfig,
    validates: bool,
    train: T,
    named: Callable[[str], T],
    contents: Callable[[T], Iterable[str]],
    pick: Callable[[T, list[int]], T],
    most: int | None,
) -> tuple[T, T | None]:
    """(rows that are left to train on, rows to evaluate on while training, or None where none are asked for).

    Args:
        validates: whether evaluations are made while training.
        named: reads what ``eval_split`` names.
        contents: of each row, what makes it the same as another one.
        pick: the rows of these numbers.
        most: rows to be held out.
    """
    if not (validates or data.always_validates):
        return train, None
    if data.eval_split:
        return train, named(data.eval_split)
    each = list(contents(train))
    keys = keys_of(each, len(each))
    last = border(keys, data.eval_share, most)
    held = [index for index, key in enumerate(keys.tolist()) if key <= last]
    kept = [index for index, key in enumerate(keys.tolist()) if key > last]
    return pick(train, kept), pick(train, held)
