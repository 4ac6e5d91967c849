"""A terminal that is closed under a program, with and without the signal that goes with it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PROGRAM = """
import fcntl, sys, termios
from adalora_dist.config.flags import user_errors
from adalora_dist.io.progress import progress_bar
if sys.argv[2] == "own":
    fcntl.ioctl(1, termios.TIOCSCTTY, 0)
with user_errors():
    print("up", flush=True)
    sys.stdin.readline()  # until the terminal is closed
    for _ in progress_bar(range(3)):
        print("more", flush=True)
        print("and more", file=sys.stderr)
    open(sys.argv[1], "w").write("done")
"""
IGNORING = ("sh", "-c", 'trap \'\' HUP; exec "$0" "$@"')
"""What nohup does, without its redirections."""


@pytest.mark.parametrize(
    ("before", "whose", "code"),
    [
        ((), "another's", 0),  # as after disown: no signal comes, but every write fails
        ((), "own", 75),
        (IGNORING, "own", 0),
    ],
)
def test_a_terminal_is_closed(tmp_path: Path, before: tuple[str, ...], whose: str, code: int) -> None:
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [*before, sys.executable, "-c", PROGRAM, tmp_path / "done", whose], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=terminal, stderr=terminal, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests may run behind nohup
    )  # fmt: skip
    os.close(terminal)
    while b"up" not in os.read(master, 1000):
        continue
    os.close(master)
    if code:
        assert process.wait(timeout=60) == code
    else:
        process.communicate(b"\n", timeout=60)
    assert process.returncode == code and (tmp_path / "done").exists() == (code == 0)
