"""Signals, heard by a thread: the main one may be in a collective, a kernel or a download for minutes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""What ends a run: launchers and schedulers, a scheduler's warning, Ctrl-C, a closed terminal."""
SECOND_SECONDS = 0.5
"""Launchers pass a Ctrl-C on that the terminal has sent already; a person takes longer for a second one."""

_listeners: list[SignalListener] = []


class SignalListener:
    """Calls ``hear(number, again)`` in a thread for each of ``SIGNALS``, until :meth:`close`.

    ``again``: it is Ctrl-C, and not the first. Python's own handlers run between two bytecodes of the main thread; here
    the interpreter's wake-up descriptor is read, which is written as soon as the signal comes. Ctrl-C and a closed
    terminal stay ignored where they are (nohup, a script's background jobs). In a thread other than the main one this
    does nothing, as signals are the main thread's there.
    """

    def __init__(self, hear: Callable[[int, bool], None]) -> None:
        self._hear = hear
        self._previous: dict[int, object] = {}
        self._first_interrupt: float | None = None
        self._is_closed = threading.current_thread() is not threading.main_thread()
        if self._is_closed:
            return
        self._read, self._write = os.pipe()
        for descriptor in (self._read, self._write):
            os.set_inheritable(descriptor, False)
        os.set_blocking(self._write, False)
        self._previous_descriptor = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in SIGNALS:
            is_ignored = signal.getsignal(number) == signal.SIG_IGN
            if not (is_ignored and number in (signal.SIGINT, signal.SIGHUP)):
                self._previous[number] = signal.signal(number, self._wake)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        _listeners.append(self)

    def close(self) -> None:
        """As it was before; what has been set since then stays."""
        if self._is_closed:
            return
        self._is_closed = True
        _listeners.remove(self)
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._wake:
                signal.signal(number, handler or signal.SIG_DFL)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._previous_descriptor, warn_on_full_buffer=False)
        os.write(self._write, b"\0")
        if threading.current_thread() is not self._thread:
            self._thread.join()
            os.close(self._read)
            os.close(self._write)

    def ignore(self) -> None:
        """From here on none of them does anything, not even after :meth:`close`: the end is near, and in order."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def _wake(self, number: int, frame: FrameType | None) -> None:
        """The interpreter has written the number already, unless somebody else has taken the descriptor."""
        if signal.set_wakeup_fd(self._write, warn_on_full_buffer=False) != self._write:
            os.write(self._write, bytes([number]))

    def _listen(self) -> None:
        while not self._is_closed:
            for number in os.read(self._read, 1):
                if number in self._previous:
                    self._hear(number, self._is_second_interrupt(number))

    def _is_second_interrupt(self, number: int) -> bool:
        if number != signal.SIGINT:
            return False
        now = time.monotonic()
        if self._first_interrupt is None:
            self._first_interrupt = now
        return now - self._first_interrupt > SECOND_SECONDS

    def _leave_to_parent(self) -> None:
        """In a fork: a worker that is told to end must not end its parent."""
        self._is_closed = True
        for number in self._previous:
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)


def _after_fork() -> None:
    if _listeners:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
        for listener in _listeners:
            listener._leave_to_parent()
        _listeners.clear()


os.register_at_fork(after_in_child=_after_fork)
