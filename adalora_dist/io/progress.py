"""Progress bars with the time left, as a terminal or a log file can show them."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(*args: Any, show: bool = True, **options: Any) -> tqdm:
    """``tqdm(*args, **options)`` where ``show``; in a log file a line every 15 seconds, not ten in one."""
    return tqdm(*args, disable=not show, mininterval=0.2 if sys.stderr.isatty() else 15.0, **options)
