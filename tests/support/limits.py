"""How long a test waits for what comes without fail where nothing is broken."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

HANG_SECONDS = 300.0
"""Whoever is not done after so long hangs. No test waits it out, or is about speed: a busy machine may be slow."""


def wait_until(true: Callable[[], object], what: str = "") -> None:
    """Raises AssertionError, with ``what``: it has not become true."""
    deadline = time.monotonic() + HANG_SECONDS
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def seconds_without_processor() -> float:
    """How long this process has been ready to go on while others had the processors: not its own slowness.

    0 where the system does not say.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    return 0.0
