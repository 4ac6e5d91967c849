"""Standard output and error that never end a program: whatever cannot be shown is escaped, or goes nowhere.

And that show nobody's secrets, and do nothing to a terminal, whoever writes: libraries print addresses with tokens in
them, and names from files that anybody may have made, in warnings, logs and errors of their own.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import stat
import sys
from collections import deque
from typing import Any, TextIO

from adalora_dist.io.redaction import redacted

_MOVES = re.compile(r"\n*(?:\x1b\[A)*")
"""All that progress bars below each other write to get from one to another."""
_UNSAFE = re.compile(r"(\x1b\[[\d;]*m)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What terminals act on, besides the ends of lines: colours, and everything else."""
_MOST_CHARACTERS, _MOST_PIECES = 1 << 16, 1 << 10
"""That are held back until their line ends."""


def safe(text: str, is_terminal: bool) -> str:
    """``text`` for a screen or a log: without secrets, and with all that a terminal would act on written out.

    Colours stay where there is a terminal, and are left out elsewhere.
    """
    if is_terminal and _MOVES.fullmatch(text):
        return text
    shown: str = redacted(text)
    return _UNSAFE.sub(lambda found: (found[1] if is_terminal else "") if found[1] else ascii(found[0])[1:-1], shown)


class _Line:
    """Of a line, what has been written so far: ``print("password:", word)`` writes it in pieces.

    Any thread may write, and a signal's handler: nothing is locked, and no piece is lost.
    """

    def __init__(self) -> None:
        self._pieces: deque[str] = deque()

    def add(self, text: str) -> str:
        """The lines that are whole now. The beginning of another is held back until it is, or until it is flushed."""
        self._pieces.append(text)
        is_long = len(text) > _MOST_CHARACTERS or len(self._pieces) > _MOST_PIECES
        if not is_long and "\n" not in text and "\r" not in text:
            return ""
        whole = self.take()
        end = len(whole) if is_long else 1 + max(whole.rfind("\n"), whole.rfind("\r"))
        if end < len(whole):
            self._pieces.appendleft(whole[end:])
        return whole[:end]

    def take(self) -> str:
        """All that is held back."""
        taken = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self._pieces.popleft())
        return "".join(taken)


class _Stream(io.TextIOWrapper):
    """Shows what is :func:`safe`. A terminal may be closed while the program goes on: then it takes what is written,
    and shows nothing."""

    replaced: io.TextIOWrapper
    """What was there before, which would close the file if it were collected."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._line = _Line()
        super().__init__(*args, **options)

    def write(self, text: str) -> int:
        self._show(self._line.add(text))
        return len(text)

    def flush(self) -> None:
        self._show(self._line.take())
        try:
            super().flush()
        except OSError as error:
            self._let_go(error)

    def _show(self, text: str) -> None:
        try:
            if text:
                super().write(safe(text, self.isatty()))
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        if error.errno not in (errno.EIO, errno.ENXIO) or not _is_terminal(self.fileno()):
            raise error
        let_go_of_terminal()


def keep_writing() -> None:
    """For a program's start: a character that the terminal's encoding lacks is written as ``\\xe9``, ``\\u2264``; a
    terminal that is closed raises nothing; what is written is :func:`safe`. Streams that something else has put in
    place are left as they are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is not io.TextIOWrapper:
            continue
        stream.flush()
        own = _Stream(stream.buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering)
        own.replaced = stream
        setattr(sys, name, own)
        _move_handlers(stream, own)


def keep_from_listeners() -> None:
    """After something has begun to listen to what is written, as trackers do: let it hear what is :func:`safe`."""
    for stream in (sys.stdout, sys.stderr):
        if "write" in vars(stream):
            _let_hear_lines(stream)


def _let_hear_lines(stream: TextIO) -> None:
    line, heard, flushed = _Line(), stream.write, stream.flush

    def hear(text: str) -> None:
        if text:
            heard(safe(text, is_terminal=False))

    def write(text: str) -> int:
        hear(line.add(text))
        return len(text)

    def flush() -> None:
        hear(line.take())
        flushed()

    stream.write, stream.flush = write, flush  # type: ignore[method-assign]


def _move_handlers(old: io.TextIOWrapper, new: io.TextIOWrapper) -> None:
    """Loggers that libraries have made while they were imported hold the stream that was there."""
    for logger in (logging.root, *logging.Logger.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)


def say(text: str) -> None:
    """Print ``text`` without the secrets in it."""
    print(redacted(text))


def clear() -> None:
    """Empty the terminal, and begin at its top."""
    sequence = "\x1b[H\x1b[2J"
    if not isinstance(sys.stdout, _Stream):  # nothing is written out there
        print(sequence, end="", flush=True)
        return
    sys.stdout.flush()
    os.write(sys.stdout.fileno(), sequence.encode())


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
            if _is_terminal(descriptor):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)


def _is_terminal(descriptor: int) -> bool:
    """Or another device that shows characters; also when it has been closed at its other end."""
    return stat.S_ISCHR(os.fstat(descriptor).st_mode)
