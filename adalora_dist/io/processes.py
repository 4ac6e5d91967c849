"""Several processes of one program, started and ended together, with one exit code and no word of our own."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence

from adalora_dist.io.signals import SignalListener

POLL_SECONDS = 0.05
ALONE_SECONDS = 1.0
"""How long the others have to end by themselves after one has failed; they watch each other, and know the cause."""
SAVE_SECONDS = 60.0
"""How long they have after a signal that they save on, and to end after they were told to."""


def run_together(command: Sequence[str], environments: Sequence[Mapping[str, str]], patient_with: int) -> int:
    """Run ``command`` once in each environment, to the end of all. Signals to this process are handed on to them.

    If one fails the others are told to end, and in the end made to.

    Args:
        patient_with: exit code of a process that was told to save and leave: the others are given the time to.

    Returns:
        0, or the exit code of the process that failed first; 128 + number of a signal that ended it.
    """
    processes: list[subprocess.Popen[bytes]] = []
    starting = threading.Lock()

    def hand_on(number: int, again: bool) -> None:
        with starting:  # what comes while they are started is for all of them
            for process in processes:
                if process.poll() is None:
                    process.send_signal(number)

    listener = SignalListener(hand_on)
    try:
        with starting:
            for environment in environments:
                processes.append(subprocess.Popen(command, env=dict(environment)))
        return _wait(processes, patient_with)
    finally:
        listener.close()


def _wait(processes: Sequence[subprocess.Popen[bytes]], patient_with: int) -> int:
    first, deadline, told = 0, float("inf"), signal.SIGTERM
    while running := [process for process in processes if process.poll() is None]:
        failed = [process.returncode for process in processes if process.returncode]
        if failed and not first:
            first = failed[0]
            deadline = time.monotonic() + (SAVE_SECONDS if first == patient_with else ALONE_SECONDS)
        if time.monotonic() > deadline:
            for process in running:
                process.send_signal(told)
            deadline, told = time.monotonic() + SAVE_SECONDS, signal.SIGKILL
        time.sleep(POLL_SECONDS)
    code = first or next((process.returncode for process in processes if process.returncode), 0)
    return 128 - code if code < 0 else code


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number
