"""Work that is killed in the middle, while somebody looks on."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable

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


def killed_at_random(
    action: Callable[[], None], look: Callable[[], None], longest_seconds: float, dice: random.Random
) -> int | None:
    """Do it in a process that is killed after a while; ``look`` all that time. Its exit code; None: it was killed."""
    number = forked(action)
    deadline = time.monotonic() + dice.uniform(0, longest_seconds)
    while not (ended := os.waitpid(number, os.WNOHANG))[0]:
        look()
        if time.monotonic() > deadline:
            os.kill(number, signal.SIGKILL)
            ended = os.waitpid(number, 0)
            break
    look()
    return os.waitstatus_to_exitcode(ended[1]) if os.WIFEXITED(ended[1]) else None
