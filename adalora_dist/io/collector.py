"""Python's collector of circles, out of the way while large tables are built."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Look for no circles inside, whatever raises; afterwards as before.

    For what makes very many lists that all stay: the collector would walk through all of them again and again, and find
    nothing. For 148,000 rows that was half of the time.
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()
