"""What happens to a row of data that cannot be used: an error that names file, row and field, or it is left out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar

from adalora_dist.io.errors import UserError

T = TypeVar("T")

logger = logging.getLogger(__name__)


class BadRows:
    """The policy ``bad_rows`` of a run, and what it has left out so far.

    The first row left out of each file is shown with its reason; ``counts`` has the number of each file.
    """

    def __init__(self, policy: Literal["error", "skip"]) -> None:
        self.policy = policy
        self.counts: Counter[str] = Counter()

    def usable(self, rows: Iterable[tuple[str, object] | UserError], parse: Callable[[object, str], T]) -> Iterator[T]:
        """``parse(row, origin)`` of each (origin, row), without the rows that it refuses.

        Readers yield a row that they cannot read as the error that says why.

        Raises:
            UserError: the first error, with the policy ``error``.
        """
        for item in rows:
            try:
                if isinstance(item, UserError):
                    raise item
                origin, row = item
                yield parse(row, origin)
            except UserError as error:
                if self.policy == "error":
                    raise
                file = str(error).partition(":")[0]
                if not self.counts[file]:
                    logger.warning("left out (bad_rows=skip; later ones of this file are only counted): %s", error)
                self.counts[file] += 1

    def summary(self) -> str | None:
        """One line for the log; None if every row could be used."""
        if not self.counts:
            return None
        files = ", ".join(f"{count} of {file}" for file, count in self.counts.items())
        return f"{sum(self.counts.values())} rows left out because they cannot be used: {files}"
