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
from adalora_dist.io.publish import write_whole
from adalora_dist.training.faults import run_lock
from adalora_dist.training.faults.run_lock import RunLock
from tests.support.faulty_runs import STEPS, Fault, Ranks, run
from tests.support.limits import HANG_SECONDS, wait_until
from tests.support.refusals import refusal

STALE_SECONDS = 4.0
"""Where an owner lives: many times as long as any of these processes is kept from showing it."""


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", STALE_SECONDS)
    monkeypatch.setattr(run_lock, "_TOUCH_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "_LOOK_SECONDS", 0.05)


class Clock:
    """In place of the module ``time``: nothing passes but what is slept. ``meanwhile`` happens in the first sleep."""

    strftime = staticmethod(time.strftime)

    def __init__(self, meanwhile: Callable[[], Any] = lambda: None) -> None:
        self.slept, self.meanwhile = 0.0, meanwhile

    def monotonic(self) -> float:
        return self.slept

    def sleep(self, seconds: float) -> None:
        if not self.slept:
            self.meanwhile()
        self.slept += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(run_lock, "time", clock)
    return clock


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
    deadline = time.monotonic() + HANG_SECONDS
    while time.monotonic() < deadline and not (folder / "enough").exists():
        if not lock.touch():
            os._exit(3)
        time.sleep(0.02)


def end(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


@pytest.mark.parametrize("clock_seconds", [-86400.0, 0.0, 86400.0])
def test_a_living_owner_of_another_machine_is_left_alone_and_a_dead_one_is_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, clock_seconds: float
) -> None:
    """Whatever its clock says, which stamps the file."""
    owner = tmp_path / ".lock-owner"

    def live_there() -> None:
        true = os.utime
        os.utime = lambda path, *_, **options: true(path, (time.time() + clock_seconds,) * 2, **options)  # type: ignore[assignment]
        live(tmp_path)

    number = elsewhere("node7", live_there)
    wait_until((tmp_path / "up-node7").exists)
    said = refusal(RunLock, tmp_path)
    assert f"in use by the run of process {number} on node7 since 20" in said
    os.kill(number, signal.SIGKILL)
    end(number)
    os.utime(owner, (time.time() + clock_seconds,) * 2)
    monkeypatch.setattr(run_lock, "time", clock := Clock())
    lock = RunLock(tmp_path)
    assert STALE_SECONDS <= clock.slept < 1.1 * STALE_SECONDS
    assert json.loads(owner.read_text())["pid"] == os.getpid()
    assert f"see whether the run of process {number} on node7 still lives" in capfd.readouterr().err
    lock.release()
    assert not list(tmp_path.glob(".lock-owner*"))


def test_an_owner_that_ends_meanwhile_need_not_be_waited_for(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / ".lock-owner").write_text(json.dumps({"host": "node7", "pid": 1, "since": "2026-01-01"}))
    clock.meanwhile = (tmp_path / ".lock-owner").unlink
    RunLock(tmp_path).release()
    assert 0 < clock.slept < STALE_SECONDS / 2


def assert_one_of_many(folder: Path) -> None:
    """Of six machines."""
    numbers = {elsewhere(f"node{k}", lambda: live(folder)) for k in range(6)}
    for _ in range(5):  # those that are refused
        number, status = os.wait()
        assert os.waitstatus_to_exitcode(status) == 2
        numbers.remove(number)
    (folder / "enough").touch()
    assert [end(number) for number in numbers] == [0]
    assert len(list(folder.glob("up-*"))) == 1 and len(list(folder.glob(".lock-owner*"))) == 1


@pytest.mark.parametrize("before", ["nothing", "a dead owner", "nonsense", "an empty file"])
def test_of_many_machines_at_once_one_has_the_folder(tmp_path: Path, before: str) -> None:
    content = {"a dead owner": json.dumps({"host": "x", "pid": 1, "since": "y"}), "nonsense": "[1", "an empty file": ""}
    for trial in range(3):
        folder = tmp_path / str(trial)
        folder.mkdir()
        if before in content:
            (folder / ".lock-owner").write_text(content[before])
        assert_one_of_many(folder)


def test_one_that_was_taken_for_dead_ends(tmp_path: Path) -> None:
    number = elsewhere("node7", lambda: live(tmp_path))
    wait_until((tmp_path / "up-node7").exists)
    os.kill(number, signal.SIGSTOP)
    os.waitpid(number, os.WUNTRACED)  # until it is
    lock = RunLock(tmp_path)
    os.kill(number, signal.SIGCONT)
    assert end(number) == 3
    assert lock.touch() and json.loads((tmp_path / ".lock-owner").read_text())["pid"] == os.getpid()
    lock.release()


DIES: dict[str, tuple[str, Callable[..., Any]]] = {
    "with an empty claim": ("_made", lambda path, _: (path.touch(), os._exit(9))),
    "before it replaces": ("write_whole", lambda *_: os._exit(9)),
    "when it has replaced": ("write_whole", lambda *words: (write_whole(*words), os._exit(9))),
}
"""Between which two of its operations."""


def dead_claim(folder: Path, host: str, way: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That of a run which died while it took the folder over."""
    name, dies = DIES[way]
    with monkeypatch.context() as patch:
        patch.setattr(run_lock, name, dies)
        number = elsewhere(host, lambda: RunLock(folder))
        assert end(number) == 9
    [claim] = folder.glob(".lock-owner.*")
    return claim


@pytest.mark.parametrize("way", DIES)
def test_a_claim_whose_holder_died_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, way: str
) -> None:
    (tmp_path / ".lock-owner").write_text("nonsense")
    dead_claim(tmp_path, "node7", way, monkeypatch)
    lock = RunLock(tmp_path)
    assert clock.slept >= STALE_SECONDS and json.loads((tmp_path / ".lock-owner").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.glob(".lock-owner.*"))
    lock.release()
    assert os.listdir(tmp_path) == [".lock"]


def test_a_claim_of_this_machine_need_not_be_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    (tmp_path / ".lock-owner").write_text("nonsense")
    dead_claim(tmp_path, socket.gethostname(), "before it replaces", monkeypatch)
    RunLock(tmp_path).release()
    assert clock.slept == 0 and os.listdir(tmp_path) == [".lock"]


def test_claims_on_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Who takes over from a dead one may die at it, too."""
    (tmp_path / ".lock-owner").write_text("nonsense")
    claim = dead_claim(tmp_path, "node7", "before it replaces", monkeypatch)
    mark = run_lock._find(claim).mark  # type: ignore[union-attr]
    (tmp_path / f"{claim.name}.{mark}").write_text("")
    RunLock(tmp_path).release()
    assert clock.slept >= 2 * STALE_SECONDS and os.listdir(tmp_path) == [".lock"]


@pytest.mark.parametrize("what", ["given back", "changed"])
def test_a_claim_whose_holder_lives_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, what: str
) -> None:
    (tmp_path / ".lock-owner").write_text("nonsense")
    claim = dead_claim(tmp_path, "node7", "before it replaces", monkeypatch)
    clock.meanwhile = claim.unlink if what == "given back" else lambda: claim.write_text("{}")
    assert "is in use by the run of " in refusal(RunLock, tmp_path)
    assert clock.slept < STALE_SECONDS / 2 and (tmp_path / ".lock-owner").read_text() == "nonsense"


def test_of_many_that_find_a_dead_claim_one_has_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".lock-owner").write_text("nonsense")
    dead_claim(tmp_path, "node7", "before it replaces", monkeypatch)
    assert_one_of_many(tmp_path)


def test_a_run_ends_when_another_has_its_folder(tmp_path: Path) -> None:
    """And writes nothing more there."""
    endless = Fault("endless", step=0, rank=None, num_steps=STEPS)
    ranks = Ranks(2, tmp_path, run, tmp_path, "ddp", endless)
    ranks.wait_for("step-2-0")
    record = {"host": "node9", "pid": 7, "since": "2030", "token": "another"}
    (tmp_path / "run" / ".lock-owner").write_text(json.dumps(record))
    ended = ranks.wait()
    assert [one.code for one in ended] == [1, 76], [one.log for one in ended]
    assert "has been taken over by another run while this one slept" in ended[0].log
    assert json.loads((tmp_path / "run" / ".lock-owner").read_text()) == record
