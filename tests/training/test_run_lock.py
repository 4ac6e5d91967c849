"""Runs on several machines that want one folder, where locks do not reach, and clocks that do not agree.

A process with another host name, and without the operating system's locks, stands for another machine.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adalora_dist.io.errors import UserError
from adalora_dist.training.faults import run_lock
from adalora_dist.training.faults.run_lock import RunLock
from tests.support.faulty_runs import STEPS, Fault, Ranks, run
from tests.support.refusals import refusal

STALE_SECONDS = 3.0


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", STALE_SECONDS)
    monkeypatch.setattr(run_lock, "_TOUCH_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "_LOOK_SECONDS", 0.05)


def without_locks(*_: Any) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def elsewhere(host: str, action: Callable[[], Any]) -> int:
    """The number of a process on another machine that does it: 0 when it could, 2 when it was refused."""
    if number := os.fork():
        return number
    socket.gethostname = lambda: host  # type: ignore[assignment]
    fcntl.flock = without_locks  # type: ignore[assignment]
    try:
        action()
        os._exit(0)
    except UserError as error:
        os._exit(2 if str(error).count("\n") == 0 else 1)
    except BaseException:
        os._exit(1)


def live(folder: Path) -> None:
    lock = RunLock(folder)
    (folder / f"up-{socket.gethostname()}").touch()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (folder / "enough").exists():
        if not lock.touch():
            os._exit(3)
        time.sleep(0.02)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


@pytest.mark.parametrize("clock_seconds", [-86400.0, 0.0, 86400.0])
def test_a_living_owner_of_another_machine_is_left_alone_and_a_dead_one_is_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], clock_seconds: float
) -> None:
    """Whatever its clock says, which stamps the file."""
    owner = tmp_path / ".lock-owner"

    def live_there() -> None:
        true = os.utime
        os.utime = lambda path, *_, **options: true(path, (time.time() + clock_seconds,) * 2, **options)  # type: ignore[assignment]
        live(tmp_path)

    number = elsewhere("node7", live_there)
    wait_for(tmp_path / "up-node7")
    said = refusal(RunLock, tmp_path)
    assert f"in use by the run of process {number} on node7 since 20" in said
    os.kill(number, signal.SIGKILL)
    end(number)
    os.utime(owner, (time.time() + clock_seconds,) * 2)
    begin = time.monotonic()
    lock = RunLock(tmp_path)
    assert STALE_SECONDS <= time.monotonic() - begin < STALE_SECONDS + 10
    assert json.loads(owner.read_text())["pid"] == os.getpid()
    assert f"see whether the run of process {number} on node7 still lives" in capfd.readouterr().err
    lock.release()
    assert not list(tmp_path.glob(".lock-owner*"))


def test_an_owner_that_ends_meanwhile_need_not_be_waited_for(tmp_path: Path) -> None:
    (tmp_path / ".lock-owner").write_text(json.dumps({"host": "node7", "pid": 1, "since": "2026-01-01"}))
    number = elsewhere("node8", lambda: (time.sleep(0.2), (tmp_path / ".lock-owner").unlink()))
    RunLock(tmp_path).release()
    assert end(number) == 0


@pytest.mark.parametrize("before", ["nothing", "a dead owner", "nonsense", "an empty file"])
def test_of_many_machines_at_once_one_has_the_folder(tmp_path: Path, before: str) -> None:
    content = {"a dead owner": json.dumps({"host": "x", "pid": 1, "since": "y"}), "nonsense": "[1", "an empty file": ""}
    for trial in range(3):
        folder = tmp_path / str(trial)
        folder.mkdir()
        if before in content:
            (folder / ".lock-owner").write_text(content[before])
        numbers = {elsewhere(f"node{k}", lambda folder=folder: live(folder)) for k in range(6)}
        for _ in range(5):  # those that are refused
            number, status = os.wait()
            assert os.waitstatus_to_exitcode(status) == 2
            numbers.remove(number)
        (folder / "enough").touch()
        assert [end(number) for number in numbers] == [0]
        assert len(list(folder.glob("up-*"))) == 1 and len(list(folder.glob(".lock-owner*"))) == 1


def test_one_that_was_taken_for_dead_ends(tmp_path: Path) -> None:
    number = elsewhere("node7", lambda: live(tmp_path))
    wait_for(tmp_path / "up-node7")
    os.kill(number, signal.SIGSTOP)
    lock = RunLock(tmp_path)
    os.kill(number, signal.SIGCONT)
    assert end(number) == 3
    assert lock.touch() and json.loads((tmp_path / ".lock-owner").read_text())["pid"] == os.getpid()
    lock.release()


def test_a_claim_that_nobody_gives_back_is_named(tmp_path: Path) -> None:
    """Its holder has died between two operations: nothing can tell that from one that is slow."""
    (tmp_path / ".lock-owner").write_text("nonsense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_lock, "write_whole", lambda *_: os._exit(9))
        number = elsewhere("node7", lambda: RunLock(tmp_path))
        assert end(number) == 9
    [claim] = tmp_path.glob(".lock-owner.*")
    assert f"remove {claim}" in refusal(RunLock, tmp_path)
    claim.unlink()
    RunLock(tmp_path).release()


def test_a_run_ends_when_another_has_its_folder(tmp_path: Path) -> None:
    """And writes nothing more there."""
    slow = Fault("slow", step=0, rank=None, num_steps=STEPS)
    ranks = Ranks(2, tmp_path, run, tmp_path, "ddp", slow)
    ranks.wait_for("step-2-0")
    record = {"host": "node9", "pid": 7, "since": "2030", "token": "another"}
    (tmp_path / "run" / ".lock-owner").write_text(json.dumps(record))
    ended = ranks.wait(60)
    assert [one.code for one in ended] == [1, 76], [one.log for one in ended]
    assert "has been taken over by another run while this one slept" in ended[0].log
    assert json.loads((tmp_path / "run" / ".lock-owner").read_text()) == record
