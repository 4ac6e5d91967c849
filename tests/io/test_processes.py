"""Processes of one program: they end together, with the exit code of the one that failed first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from adalora_dist.io import processes
from adalora_dist.io.processes import run_together
from tests.support.limits import HANG_SECONDS, wait_until
from tests.support.paths import ROOT


def run(program: str, num_processes: int = 3) -> int:
    environments = [{**os.environ, "RANK": str(rank)} for rank in range(num_processes)]
    start = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
    return run_together([sys.executable, "-S", "-c", start + textwrap.dedent(program)], environments, patient_with=75)


def test_all_end_well() -> None:
    assert run("sys.exit(0)") == 0


def test_the_first_code_counts_and_the_others_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ALONE_SECONDS", 0.1)
    begin = time.monotonic()
    assert run("sys.exit(2) if rank == 1 else time.sleep(600)") == 2
    assert run("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(600)") == 128 + signal.SIGKILL
    assert time.monotonic() - begin < 300


def test_who_does_not_end_is_made_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ALONE_SECONDS", 0.5)
    monkeypatch.setattr(processes, "SAVE_SECONDS", 0.5)
    deaf = f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(f"{tmp_path}/deaf-{{rank}}", "w").close()
        while rank == 0 and len(os.listdir("{tmp_path}")) < 3:
            time.sleep(0.01)
        sys.exit(3) if rank == 0 else time.sleep(600)
    """
    assert run(deaf) == 3


def test_a_signal_reaches_all_and_they_may_save(tmp_path: Path) -> None:
    saves = f"""
        def save(*_):
            time.sleep(0.3 * rank)
            open(f"{tmp_path}/saved-{{rank}}", "w").close()
            os._exit(75)
        signal.signal(signal.SIGTERM, save)
        open(f"{tmp_path}/ready-{{rank}}", "w").close()
        time.sleep(600)
    """
    program = f"import tests.io.test_processes as t, sys; sys.exit(t.run({saves!r}))"
    started = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    wait_until(lambda: started.poll() is not None or len(list(tmp_path.glob("ready-*"))) == 3)
    started.send_signal(signal.SIGTERM)
    assert started.wait(HANG_SECONDS) == 75
    assert len(list(tmp_path.glob("saved-*"))) == 3


def test_a_port_is_free() -> None:
    assert 1024 <= processes.free_port() < 65536
