"""Rows of data sets on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.rows.bad_rows import Rows

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class HubData:
    """A data set on the Hub: ``load_dataset(path, name, revision=revision)``."""

    path: str
    name: str | None = None
    revision: str | None = None

    def where(self, split: str) -> str:
        """``path/name/split``, for error messages and origins of rows."""
        return "/".join(part for part in (self.path, self.name, split) if part)

    def load(self, split: str, instead: str) -> Dataset:
        """One split, as the Hub has it.

        Args:
            instead: how to use local files, for the error.

        Raises:
            UserError: the data set cannot be loaded.
        """
        import datasets

        try:
            return datasets.load_dataset(self.path, self.name, split=split, revision=self.revision)
        except Exception as error:  # whatever HTTP client, cache or parser failed, the user can do the same about it
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"data='hub': cannot load {self.where(split)} ({reason}); check the network and HF_HUB_OFFLINE, or use "
                f"local files: {instead}"
            ) from error

    def rows(self, split: str, instead: str) -> Rows:
        """Yield (origin, row) of one split; origin is ``path/name/split:row``, row 1 first. As :meth:`load`."""
        for number, row in enumerate(self.load(split, instead), start=1):
            yield f"{self.where(split)}:{number}", row
