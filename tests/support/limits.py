"""How long a test waits for what comes without fail where nothing is broken."""

from __future__ import annotations

import time
from collections.abc import Callable

HANG_SECONDS = 300.0
"""Whoever is not done after so long hangs. No test waits it out, or is about speed: a busy machine may be slow."""


def wait_until(true: Callable[[], object], what: str = "") -> None:
    """Raises AssertionError, with ``what``: it has not become true."""
    deadline = time.monotonic() + HANG_SECONDS
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
