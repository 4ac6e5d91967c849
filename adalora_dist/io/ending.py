"""The end of a program: what it says last, and how it leaves at once.

Launchers print after their processes have ended: tracebacks of their own, tables, lists of what they kill. Whoever
looks at the screen then would find everything but the cause there. So the cause is said when it happens, and once more
when the launcher has ended, by a small process that waits for that.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import psutil

from adalora_dist.io.errors import printable
from adalora_dist.io.launchers import launchers
from adalora_dist.io.redaction import redacted

EXIT_PREEMPTED = 75
"""Exit code after a signal that ends a run: it can go on from its newest checkpoint. (EX_TEMPFAIL in sysexits.h.)"""
LAUNCHER_SECONDS = 60
"""How long a launcher may take to end after its process: they wait 30 seconds for others."""

_NOBODYS_CHILD = 'exec 3<&0; "$@" <&3 3<&- &'
"""For a shell, which is gone in a moment: DeepSpeed's launcher ends all descendants of its processes."""
_LAST_WORD = """
import sys, time, psutil
pid, created, seconds = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
line, deadline = sys.stdin.buffer.read(), time.monotonic() + seconds
def lives():
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - created) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
while lives():
    if time.monotonic() > deadline:
        sys.exit()
    time.sleep(0.01)
if sys.stderr.isatty():  # where the shell's prompt comes first
    time.sleep(0.2)
    line = b"\\n" + line
sys.stderr.buffer.write(line)
"""
_told = False


_MAX_LINE_CHARACTERS = 4000


def tell_error(text: object) -> None:
    """Print ``error: <one line>`` on standard error, as the last thing that is seen of this program.

    Under a launcher that line comes once, at the launcher's end. What is printed at once, since there may be nobody to
    print it later (a container ends with its launcher), begins with the program's name.
    """
    line = f"error: {printable(redacted(' '.join(str(text).split())), _MAX_LINE_CHARACTERS)}"
    repeat_last(line)  # first, since a launcher may end this process any moment because of another one
    print(f"{Path(sys.argv[0]).name}: {line}" if launchers() else line, file=sys.stderr, flush=True)


def repeat_last(line: str) -> None:
    """Say ``line``, which has been said, again when the launcher, if there is one, has printed what it prints.

    Reaches standard error as this process has it, a pipe or a file too: who reads to the end of a pipe gets the line.
    """
    global _told
    _told = True
    found = launchers()
    if not found:
        return
    launcher, _ = found[-1]
    # Gone by now, or no process to be had: it has been said once.
    with contextlib.suppress(psutil.Error, OSError, subprocess.TimeoutExpired):
        about = (launcher.pid, launcher.create_time(), LAUNCHER_SECONDS)
        process = subprocess.Popen(
            ["/bin/sh", "-c", _NOBODYS_CHILD, "sh", sys.executable, "-c", _LAST_WORD, *map(str, about)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        assert process.stdin is not None
        process.stdin.write(line.encode("utf-8", "backslashreplace") + b"\n")
        process.stdin.close()
        process.wait(LAUNCHER_SECONDS)


def has_failed() -> bool:
    """Whether an error has been told, or nobody has caught one: for what would else complain at exit."""
    return _told or getattr(sys, "last_value", None) is not None


def leave(code: int) -> NoReturn:
    """End this process at once: collectives in flight would keep the interpreter from ending by itself."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(code)
