"""What processes of a run tell each other about its end: who they are, and who is to blame."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil

EXIT_PEER = 76
"""Exit code of a process that stops because of another one."""


class Identity(NamedTuple):
    """A process, so that another with the same number can be told from it."""

    rank: int
    host: str
    pid: int
    created: float

    @classmethod
    def of_this_process(cls, rank: int) -> Identity:
        return cls(rank, socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Meeting(NamedTuple):
    """Where rank 0 listens; the same on all ranks."""

    host: str
    port: int
    token: str
    hub: Identity


@dataclass(frozen=True)
class Verdict:
    """Why the run ends: what one rank reported, or that it is gone and can report nothing."""

    rank: int
    text: str
    code: int
    """Exit code of the other processes."""
    follows: bool = False
    """What it reports is a broken collective, which most likely follows from another rank's end."""
    is_gone: bool = False
    identity: tuple[int, str, int, float] | None = None


_SLOW_FACTOR = 5
_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
_CLOCK_SECONDS = 2.0
"""When a process was created is counted from the machine's start, which is known to a second, now so and now so."""


def is_missing(identity: Identity | None, silent_seconds: float, timeout_seconds: float) -> bool:
    """Whether a process that has said nothing for so long counts as stopped.

    On this machine the operating system knows. One that is merely slow, because it gets no processor or something
    holds its interpreter lock, has several times as long here: not for ever, since a frozen control group looks like
    that, too. Of other machines silence is all there is to go by.
    """
    if silent_seconds <= timeout_seconds:
        return False
    process = _local_process(identity)
    if process is None or silent_seconds > _SLOW_FACTOR * timeout_seconds:
        return True
    try:
        return process.status() in _STOPPED
    except psutil.Error:
        return True


def _local_process(identity: tuple[int, str, int, float] | None) -> psutil.Process | None:
    """That process, if it is on this machine and still there, and not another that has its number now."""
    if identity is None or identity[1] != socket.gethostname():
        return None
    try:
        process = psutil.Process(identity[2])
        return process if abs(process.create_time() - identity[3]) < _CLOCK_SECONDS else None
    except psutil.Error:
        return None


def missed(rank: int, identity: Identity | None, silent_seconds: float | None) -> Verdict:
    """The verdict on a rank that says nothing any more; without ``silent_seconds`` its connection has ended."""
    what = "has ended without a word: it was killed, or its machine ran out of memory"
    if silent_seconds is not None:
        what = f"has not been heard of for {silent_seconds:.0f} s: it, or its machine, was stopped"
    return Verdict(rank, f"{identity or f'rank {rank}'} {what}", EXIT_PEER, is_gone=True, identity=identity)


@dataclass
class State:
    """What a rank says of itself with every beat."""

    asks: bool = False
    """It was told to stop: all are to save and leave at the same step."""
    promise: int | None = None
    """Its loop goes no further than this many finished steps before it knows where all stop."""
    report: Mapping[str, Any] | None = None
    """Its verdict on itself."""
    done: bool = False


class Line:
    """A socket that carries JSON objects, one a line.

    Args:
        token: the other end's first line must be this, and nothing that a stranger sends is parsed; None: no such line.
    """

    def __init__(self, connection: socket.socket, timeout_seconds: float, token: str | None = None) -> None:
        connection.settimeout(timeout_seconds)
        self.socket, self._rest, self._awaited = connection, b"", token
        self.rank: int | None = None

    def introduce(self, token: str) -> None:
        """Send the token that the other end waits for."""
        self.socket.sendall(token.encode() + b"\n")

    def send(self, message: Mapping[str, Any]) -> None:
        self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """What has come; blocks until something has. Raises EOFError at the end, OSError, ValueError."""
        data = self.socket.recv(1 << 16)
        if not data:
            raise EOFError
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._awaited is not None and lines:
            if not secrets.compare_digest(lines.pop(0), self._awaited.encode()):
                raise ValueError("a stranger")
            self._awaited = None
        if len(self._rest) > (1 << 16 if self._awaited is None else len(self._awaited)):
            raise ValueError("an endless line")
        return [json.loads(line) for line in lines]


def listen(host: str) -> socket.socket:
    """A socket that takes connections to ``host``, as the others know this machine, on any free port."""
    if host in ("localhost", "127.0.0.1"):
        return socket.create_server((host, 0))
    try:  # on all addresses: the name may mean another one when it is looked up here
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    except (OSError, ValueError):
        return socket.create_server(("", 0))


def kill_stopped(identity: tuple[int, str, int, float] | None) -> None:
    """A stopped process outlives its run, since launchers' polite signals do not reach it: end it, if it is here."""
    process = _local_process(identity)
    if process is not None:
        with contextlib.suppress(psutil.Error):
            process.kill()
