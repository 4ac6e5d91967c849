"""Rows of data sets on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from adalora_dist.io.errors import UserError


def raw_hub_rows(
    path: str, name: str | None, split: str, instead: str, revision: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (origin, row) of one split of a data set as the Hub has it; origin is ``path/name/split:row``.

    Args:
        instead: how to use local files, for the error.

    Raises:
        UserError: the data set cannot be loaded.
    """
    import datasets

    origin = "/".join(part for part in (path, name, split) if part)
    try:
        rows = datasets.load_dataset(path, name, split=split, revision=revision)
    except Exception as error:  # whatever HTTP client, cache or parser failed, the user can do the same about it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data='hub': cannot load {origin} ({reason}); check the network and HF_HUB_OFFLINE, or use local files: "
            f"{instead}"
        ) from error
    for number, raw in enumerate(rows, start=1):
        yield f"{origin}:{number}", raw
