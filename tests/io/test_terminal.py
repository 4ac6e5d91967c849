"""A terminal that is closed under a program, with and without the signal that goes with it."""

from __future__ import annotations

import logging
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adalora_dist.io.terminal import _Line, safe
from tests.support.limits import HANG_SECONDS
from tests.support.paths import ROOT
from tests.support.secret_words import IN_PATHS, IN_TEXT, INNOCENT, SECRET

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
        assert process.wait(timeout=HANG_SECONDS) == code
    else:
        process.communicate(b"\n", timeout=HANG_SECONDS)
    assert process.returncode == code and (tmp_path / "done").exists() == (code == 0)


# ------------------------------------------------------------------------------------------------ what libraries print

LIBRARY = """
import logging, re, sys, warnings
early = logging.getLogger("early")
early.addHandler(logging.StreamHandler())  # as libraries make them while they are imported
from adalora_dist.config.flags import user_errors
from adalora_dist.io.progress import progress_bar
from adalora_dist.io.terminal import keep_from_listeners
with user_errors():
    from tests.support.secret_words import IN_PATHS, IN_TEXT
    late = logging.getLogger("late")
    late.addHandler(logging.StreamHandler(sys.stdout))
    heard = []  # as a tracker listens
    write = sys.stdout.write
    sys.stdout.write = lambda text: (heard.append(text), write(text))[1]
    keep_from_listeners()
    controls = "red \\x1b[31m, empty \\x1b[2J, title \\x1b]0;x\\x07, \\x9b1m \\u202e"
    for shape in (*IN_PATHS.values(), *IN_TEXT.values(), controls):
        print("from", shape)
        print("from", shape, file=sys.stderr)
        warnings.warn(shape)
        early.error("from %s", shape)
        late.error("from %s", shape)
        for _ in progress_bar([1], desc=shape): pass
        for stream in (sys.stdout, sys.stderr):
            if "\\n" not in shape:
                print("in pieces ", *re.split("([^a-z])", shape), sep="", file=stream)
    with open(sys.argv[1], "w") as file:
        file.writelines(heard)
    raise RuntimeError("; ".join([*IN_PATHS.values(), *IN_TEXT.values()]))
"""


def test_whatever_libraries_print_has_no_secret_and_does_nothing_to_a_terminal(tmp_path: Path) -> None:
    """Printed, warned of, logged by handlers old and new, shown beside a bar, raised, and heard by a tracker."""
    words = [sys.executable, "-c", LIBRARY, str(tmp_path / "heard")]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "RuntimeError" in done.stderr, done.stderr[-2000:]
    heard = (tmp_path / "heard").read_text()
    for said in (done.stdout, done.stderr, heard):
        hits = [name for name, secret in (*IN_PATHS.items(), ("text", SECRET)) if secret in said]
        assert not hits and said.count("***") >= len(IN_PATHS) + len(IN_TEXT)
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", said)
        assert "red , empty \\x1b[2J, title \\x1b]0;x\\x07, \\x9b1m \\u202e" in said


def test_what_a_terminal_may_be_sent() -> None:
    bars = "\n\n\x1b[A\x1b[A"
    assert safe(bars, is_terminal=True) == bars and safe("\rred \x1b[31mx\x1b[0m\n", True) == "\rred \x1b[31mx\x1b[0m\n"
    assert safe("up \x1b[A", True) == "up \\x1b[A" and safe("\x1b[2J", True) == "\\x1b[2J"
    assert safe(bars, is_terminal=False) == "\n\n\\x1b[A\\x1b[A" and safe("\x1b[1;31mx\x1b[0m", False) == "x"
    for text in (*INNOCENT, "größe ≤ 7 🚀 ▁▂▃ 👩‍🔬\ttab\nline\n"):
        assert safe(text, True) == safe(text, False) == text


def test_no_piece_of_a_line_is_lost_or_held_back_for_ever() -> None:
    line = _Line()
    assert line.add("a ") == line.add("b") == "" and line.add(" c\nd") == "a b c\n" and line.add("\r") == "d\r"
    assert line.add("e") == "" and line.take() == "e" and line.take() == ""
    assert line.add("x" * 100_000) == "x" * 100_000
    assert sum(len(line.add("y")) for _ in range(5000)) + len(line.take()) == 5000 and len(line.add("z\n")) == 2


def test_streams_of_others_and_their_loggers_stay(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a program that has put in its own, as a test does."""
    from adalora_dist.io.terminal import keep_from_listeners, keep_writing

    before = sys.stdout, sys.stderr, list(logging.root.handlers)
    keep_writing()
    keep_from_listeners()
    assert (sys.stdout, sys.stderr, list(logging.root.handlers)) == before
