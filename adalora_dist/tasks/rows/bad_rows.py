"""What happens to a row of data that cannot be used: an error that names file, row and field, or it is left out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar

from adalora_dist.io.errors import UserError

T = TypeVar("T")

Rows = Iterable[tuple[str, object]]
"""(origin, row) of each row: origin is ``file:row``, row 1 first; a row that cannot be read is the error that says why.
"""

logger = logging.getLogger(__name__)


class BadRows:
    """The policy ``bad_rows`` of a run, and what it has left out so far.

    The first row left out of each file is shown with its reason; ``counts`` has the number of each file, ``reasons``
    what was wrong with its first.
    """

    def __init__(self, policy: Literal["error", "skip"]) -> None:
        self.policy = policy
        self.counts: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}

    def usable(self, rows: Rows, parse: Callable[[object, str], T]) -> Iterator[T]:
        """``parse(row, origin)`` of each row, without those that it refuses.

        Raises:
            UserError: the first error, with the policy ``error``.
        """
        for origin, row in rows:
            try:
                if isinstance(row, UserError):
                    raise row
                yield parse(row, origin)
            except UserError as error:
                if self.policy == "error":
                    raise
                self.leave_out(origin.rpartition(":")[0], 1, str(error))

    def leave_out(self, file: str, count: int, reason: str) -> None:
        """Count rows of ``file`` as left out; ``reason`` is the error of the first."""
        if not self.counts[file]:
            self.reasons[file] = reason
            logger.warning("left out (bad_rows=skip; later ones of this file are only counted): %s", reason)
        self.counts[file] += count

    def summary(self) -> str | None:
        """One line for the log; None if every row could be used."""
        if not self.counts:
            return None
        files = ", ".join(f"{count} of {file}" for file, count in self.counts.items())
        return f"{sum(self.counts.values())} rows left out because they cannot be used: {files}"
