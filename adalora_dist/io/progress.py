"""Progress bars with the time left, as a terminal or a log file can show them."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def duration(seconds: float) -> str:
    """In words: 1 h 02 min, 3 min 20 s, 45 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def progress_bar(*args: Any, show: bool = True, **options: Any) -> tqdm:
    """``tqdm(*args, **options)`` where ``show``; in a log file a line every 15 seconds, not ten in one."""
    return tqdm(*args, disable=not show, mininterval=0.2 if sys.stderr.isatty() else 15.0, **options)
