"""Work that is killed in the middle, at a random time or at each of its lines, while somebody looks on."""

from __future__ import annotations

import math
import mmap
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from tqdm import tqdm

from adalora_dist.io.errors import UserError


def own_progress_lock() -> None:
    """In a fork: the lock of progress bars is shared with the parent, and a process that is killed would keep it."""
    tqdm.set_lock(threading.RLock())


def forked(action: Callable[[], None]) -> int:
    """The number of a process that does it, and ends: 0, or 2 after a refusal."""
    if number := os.fork():
        return number
    own_progress_lock()
    try:
        action()
        os._exit(0)
    except UserError:
        os._exit(2)
    except BaseException:
        os._exit(1)


def _watched(number: int, look: Callable[[], None], deadline: float = math.inf) -> int | None:
    """Look until that process has ended, and once more; it is killed at the deadline. Its exit code; None: killed."""
    while not (ended := os.waitpid(number, os.WNOHANG))[0]:
        look()
        if time.monotonic() > deadline:
            os.kill(number, signal.SIGKILL)
            ended = os.waitpid(number, 0)
            break
    look()
    return os.waitstatus_to_exitcode(ended[1]) if os.WIFEXITED(ended[1]) else None


def killed_at_random(
    action: Callable[[], None], look: Callable[[], None], longest_seconds: float, dice: random.Random
) -> int | None:
    """Do it in a process that is killed after a while; ``look`` all that time. Its exit code; None: it was killed."""
    return _watched(forked(action), look, time.monotonic() + dice.uniform(0, longest_seconds))


def killed_at_line(action: Callable[[], None], look: Callable[[], None], line: int) -> int | None:
    """Do it in a process that is killed before the ``line``-th line of Python that it runs, of whatever file.

    ``look`` all that time. Its exit code if it has fewer lines; None: it was killed. The same on any machine, however
    busy.
    """

    def kill(number: int) -> None:
        if number == line:
            os.kill(os.getpid(), signal.SIGKILL)

    return _watched(forked(lambda: _at_each_line(action, kill)), look)


def num_lines(action: Callable[[], None]) -> int:
    """How many lines of Python it runs, in a process of its own."""
    counted = mmap.mmap(-1, 8)  # shared with the fork

    def count(number: int) -> None:
        counted[:] = number.to_bytes(8, "little")

    assert _watched(forked(lambda: _at_each_line(action, count)), lambda: None) == 0
    return int.from_bytes(counted[:], "little")


def _at_each_line(action: Callable[[], None], do: Callable[[int], None]) -> None:
    """``do`` before each line of Python that ``action`` runs, with its number: 1, 2, ..."""
    number = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal number
        if event == "line":
            number += 1
            do(number)
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(None)
