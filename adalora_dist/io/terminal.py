"""Standard output and error that never end a program: whatever cannot be shown is escaped, or goes nowhere."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import sys

from adalora_dist.io.redaction import redacted


class _Terminal(io.TextIOWrapper):
    """A terminal that may be closed while the program goes on: then it takes what is written, and shows nothing."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._let_go(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        if error.errno not in (errno.EIO, errno.ENXIO):
            raise error
        let_go_of_terminal()


def keep_writing() -> None:
    """For a program's start: a character that the terminal's encoding lacks is written as ``\\xe9``, ``\\u2264``; a
    terminal that is closed raises nothing. Streams that something else has put in place are left as they are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is not io.TextIOWrapper:
            continue
        stream.reconfigure(errors="backslashreplace")
        if stream.isatty():
            stream.flush()
            # The stream itself lives on as sys.__stdout__, or else it would close the terminal when it is collected.
            setattr(sys, name, _Terminal(stream.buffer, stream.encoding, stream.errors, line_buffering=True))


def say(text: str) -> None:
    """Print ``text`` without the secrets in it."""
    print(redacted(text))


def page(text: str) -> None:
    """Print ``text`` for somebody who may look at its beginning alone, ``adalora-dist ls | head``: that is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)  # what the interpreter flushes at its end
        os.close(null)


def let_go_of_terminal() -> None:
    """The terminal is closed, or about to be: from here on what would be written there goes nowhere."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)
