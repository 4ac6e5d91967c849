"""What goes wrong on one rank ends the run on all, soon, with one error; what can be survived is survived."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from adalora_dist.io.ending import EXIT_PREEMPTED
from adalora_dist.training.faults.guard import STATUS_FILE
from adalora_dist.training.faults.peers import Peers
from adalora_dist.training.faults.verdict import EXIT_PEER, Identity, is_missing
from tests.support.faulty_runs import HOLD_SECONDS, STEPS, Ended, Fault, Ranks, Untouched, corrupt, run

SLOW = Fault("slow", step=0, rank=None, num_steps=STEPS)
ENDLESS = Fault("endless", step=0, rank=None, num_steps=STEPS)
TIMEOUT_SECONDS = 3


def errors(ended: list[Ended]) -> list[str]:
    """Lines that look like errors, over all ranks."""
    signs = ("rror:", "Traceback", "gloo")
    return [line for one in ended for line in one.log.splitlines() if any(sign in line for sign in signs)]


def also_slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# ------------------------------------------------------------------------------------------------ one rank goes wrong


@pytest.mark.parametrize(
    ("kind", "rank", "code", "says"),
    [
        ("raise", 1, 1, "KeyError: 'a broken row'"),
        also_slow("raise", 0, 1, "KeyError: 'a broken row'"),
        ("memory", 0, 1, "error: rank 0: OutOfMemoryError (CUDA out of memory. Tried to allocate 2.00 GiB): in step 6"),
        also_slow("memory", 2, 1, "error: rank 2: OutOfMemoryError (CUDA out of memory."),
        also_slow("exit", 0, 3, ""),
        ("exit", 1, 3, ""),
    ],
)
def test_an_error_on_one_rank_ends_all(tmp_path: Path, kind: str, rank: int, code: int, says: str) -> None:
    ended = Ranks(3, tmp_path, run, tmp_path, "ddp", Fault(kind, rank=rank)).wait()
    assert [one.code for one in ended] == [code if k == rank else EXIT_PEER for k in range(3)], errors(ended)
    assert says in ended[rank].log and not list(tmp_path.glob("published-*"))
    for k, one in enumerate(ended):
        assert k == rank or not errors([one]), one.log


def test_out_of_memory_says_what_to_change(tmp_path: Path) -> None:
    [ended] = Ranks(1, tmp_path, run, tmp_path, "single", Fault("memory", rank=0)).wait()
    [line] = [line for line in ended.log.splitlines() if line.startswith("error:")]
    assert ended.code == 1 and "Traceback" not in ended.log
    assert all(part in line for part in ("backbone", "adapters", "optimizer", "importance", "activations")), line
    assert "(1) micro_batch_size 8 -> 4" in line and "(2) gradient_checkpointing" in line and "(3) " in line


@pytest.mark.parametrize("rank", [0, also_slow(1)])
def test_a_stopped_rank_is_named_and_does_not_outlive_the_run(tmp_path: Path, rank: int) -> None:
    ranks = Ranks(3, tmp_path, run, tmp_path, "ddp", ENDLESS, {"peer_timeout_seconds": TIMEOUT_SECONDS})
    ranks.wait_for(f"step-3-{rank}")
    os.kill(ranks.pids[rank], signal.SIGSTOP)
    ended = ranks.wait()
    assert [one.code for one in ended] == [-signal.SIGKILL if k == rank else EXIT_PEER for k in range(3)]
    named = f"error: rank {rank} (process {ranks.pids[rank]} on "
    speaker = ended[1 if rank == 0 else 0]
    silent = re.search(r"has not been heard of for (\d+) s", speaker.log)
    assert named in speaker.log and silent and int(silent[1]) >= TIMEOUT_SECONDS, speaker.log
    assert len(errors(ended)) == 1 and not list(tmp_path.glob("published-*"))


@pytest.mark.parametrize("rank", [1, also_slow(0)])
def test_a_killed_rank_is_named_at_once(tmp_path: Path, rank: int) -> None:
    ranks = Ranks(3, tmp_path, run, tmp_path, "ddp", ENDLESS)
    ranks.wait_for(f"step-3-{rank}")
    os.kill(ranks.pids[rank], signal.SIGKILL)
    ended = ranks.wait()
    assert [one.code for one in ended] == [-signal.SIGKILL if k == rank else EXIT_PEER for k in range(3)]
    [line] = errors(ended)
    assert line.startswith(f"error: rank {rank} (process {ranks.pids[rank]} on ") and "has ended without a word" in line


@pytest.mark.slow
def test_nobody_is_missed_while_all_are_stopped(tmp_path: Path) -> None:
    """A machine that sleeps, or a shell's Ctrl-Z, stops every rank at once."""
    ranks = Ranks(2, tmp_path, run, tmp_path, "ddp", SLOW, {"peer_timeout_seconds": 2})
    ranks.wait_for("step-2-0")
    for number, pause in ((signal.SIGSTOP, 3.0), (signal.SIGCONT, 0.0)):
        for pid in ranks.pids:
            os.kill(pid, number)
        time.sleep(pause)
    ended = ranks.wait()
    assert [one.code for one in ended] == [0, 0], errors(ended)


@pytest.mark.parametrize("rank", [0, also_slow(1)])
def test_a_rank_that_is_only_slow_is_not_missed(tmp_path: Path, rank: int) -> None:
    """Silent for twice the timeout, and seen to be no stopped process."""
    hold, changes = Fault("hold", step=3, rank=rank), {"peer_timeout_seconds": HOLD_SECONDS / 2}
    ended = Ranks(2, tmp_path, run, tmp_path, "ddp", hold, changes).wait()
    assert [one.code for one in ended] == [0, 0], errors(ended)


def test_silence_means_a_stop_at_once_or_after_a_while() -> None:
    """By what the operating system says of the process, where it can be asked."""
    here = Identity.of_this_process(1)
    elsewhere, another, gone = (
        here._replace(**change) for change in ({"host": "node7"}, {"created": here.created - 60}, {"pid": 2**22 + 1})
    )
    assert not any(is_missing(one, 60, 60) for one in (here, elsewhere, another, gone, None))
    assert all(is_missing(one, 61, 60) for one in (elsewhere, another, gone, None))
    assert not is_missing(here, 61, 60) and not is_missing(here, 299, 60) and is_missing(here, 301, 60)


def strangers(rank: int, world_size: int) -> None:
    """Both ends of the watch in one process, and others who call."""
    shared: list[Any] = []
    first = Peers(0, 2, 5, lambda value: shared.extend(value) or value)
    second = Peers(1, 2, 5, lambda value: shared)
    host, port, *_ = first._meeting
    for words in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"{}\n",
        b"[]\n",
        b'{"token": "x", "identity": []}\n',
        b"[" * 50_000 + b"\n",
        b"x" * 200_000,
        b"",
    ):
        with socket.create_connection((host, port)) as line, contextlib.suppress(OSError):  # hung up on earlier
            line.sendall(words)
            line.shutdown(socket.SHUT_WR)
            assert line.recv(1) == b""  # it has been read, and hung up on
    assert first._thread is not None and second._thread is not None
    assert first._thread.is_alive() and second._thread.is_alive() and first.verdict is None
    second.close()
    first.close()
    assert not first._thread.is_alive() and not second._thread.is_alive()


def test_strangers_on_the_port_change_nothing(tmp_path: Path) -> None:
    [ended] = Ranks(1, tmp_path, strangers).wait()
    assert ended.code == 0, ended.log


# ------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    ("world_size", "number", "receivers"),
    [
        (3, signal.SIGTERM, [2]),
        (1, signal.SIGUSR1, [0]),
        also_slow(3, signal.SIGUSR1, [0, 1, 2]),
        also_slow(2, signal.SIGTERM, [0]),
    ],
)
def test_a_signal_stops_all_ranks_after_the_same_step(
    tmp_path: Path, world_size: int, number: int, receivers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STATUS_FILE, str(tmp_path / "status"))
    ranks = Ranks(world_size, tmp_path, run, tmp_path, "ddp", ENDLESS)
    ranks.wait_for("step-3-0")
    for rank in receivers:
        os.kill(ranks.pids[rank], number)
    ended = ranks.wait()
    assert [one.code for one in ended] == [EXIT_PREEMPTED] * world_size, errors(ended)
    last = [max(step for step in range(STEPS) if (tmp_path / f"step-{step}-{k}").exists()) for k in range(world_size)]
    assert len(set(last)) == 1 and 3 <= last[0] < STEPS - 1
    assert f"after step {last[0] + 1}; run again with --resume auto" in ended[0].log
    assert json.loads((tmp_path / "status").read_text()) == {"status": "preempted", "num_finished_steps": last[0] + 1}
    assert not errors(ended) and not list(tmp_path.glob("published-*"))


def test_a_run_that_a_signal_stopped_continues_to_the_same_end(tmp_path: Path) -> None:
    assert Ranks(2, tmp_path / "whole", run, tmp_path / "whole").wait()[0].code == 0
    ranks = Ranks(2, tmp_path / "cut", run, tmp_path / "cut", "ddp", ENDLESS)
    ranks.wait_for("step-6-1")
    os.kill(ranks.pids[1], signal.SIGTERM)
    assert [one.code for one in ranks.wait()] == [EXIT_PREEMPTED] * 2
    again = Ranks(2, tmp_path / "again", run, tmp_path / "cut", "ddp", Fault(), {"resume": "auto"}).wait()
    assert [one.code for one in again] == [0, 0], errors(again)
    whole, cut = (torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)


# ----------------------------------------------------------------------------------------------------------- disk full


@pytest.mark.parametrize("in_thread", [False, also_slow(True)])
def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(tmp_path: Path, in_thread: bool) -> None:
    changes = {"checkpoint_every": 4, "async_checkpoints": in_thread}
    ended = Ranks(2, tmp_path, run, tmp_path, "ddp", Fault("disk", step=6, rank=0), changes).wait()
    assert ended[0].code == 2 and ended[1].code in (2, EXIT_PEER), errors(ended)
    [line] = [line for one in ended for line in one.log.splitlines() if line.startswith("error:")]
    assert re.search(r"a checkpoint needs [\d,]{5,} bytes, .* has [\d,]+ free", line), line
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step-00000000", "step-00000004"}
    again = Ranks(2, tmp_path / "again", run, tmp_path, "ddp", Fault(), {**changes, "resume": "auto"}).wait()
    assert [one.code for one in again] == [0, 0], errors(again)


# ---------------------------------------------------------------------------------------------------------- nan and inf


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        ("ddp", "nan"),
        ("fsdp2", "gradient"),
        *(also_slow(*case) for case in (("ddp", "inf"), ("ddp", "gradient"), ("fsdp2", "nan"), ("fsdp2", "inf"))),
        *(also_slow(engine, kind) for engine in ("zero2", "zero3") for kind in ("nan", "inf", "gradient")),
    ],
)
def test_a_bad_step_leaves_everything_untouched(tmp_path: Path, engine: str, kind: str) -> None:
    for step in (5, 8):  # between two prunings, and at one
        folder, fault = tmp_path / str(step), Fault(kind, step=step)
        ended = Ranks(2, folder, run, folder, engine, fault, {"compact": False}, Untouched(fault)).wait()
        assert [(one.code, one.log.count("compared")) for one in ended] == [(0, 1)] * 2, [one.log for one in ended]
        assert len(list(folder.glob("published-*"))) == 2  # with the budget met: ``run`` asserts it


@pytest.mark.parametrize(
    ("engine", "kind", "says"),
    [
        ("ddp", "nan", "first on rank 1: the loss is nan"),
        also_slow("ddp", "gradient", "first on rank 1: the gradient of model.layers.0.self_attn.q_proj.lam"),
        ("fsdp2", "gradient", "first on rank 1: the gradient of model.layers.0.self_attn.q_proj.lam"),
        also_slow("zero2", "gradient", "first on rank 1: the gradient of model.layers.0.self_attn.q_proj.lam"),
        also_slow("zero3", "gradient", "first on rank 1: the gradient of model.layers.0.self_attn.q_proj.lam"),
    ],
)
def test_too_many_bad_steps_end_the_run_and_name_the_origin(tmp_path: Path, engine: str, kind: str, says: str) -> None:
    fault, changes = Fault(kind, step=4, num_steps=100), {"max_nonfinite_steps": 6}
    ended = Ranks(2, tmp_path, run, tmp_path, engine, fault, changes).wait()
    assert ended[0].code == 2 and ended[1].code in (2, EXIT_PEER), [one.log for one in ended]
    [line] = [line for line in ended[0].log.splitlines() if line.startswith("error:")]
    assert "max_nonfinite_steps=6" in line and says in line, line
    assert len(errors(ended)) == 1 and not list(tmp_path.glob("published-*"))


def test_bad_steps_apart_from_each_other_do_not_end_a_run(tmp_path: Path) -> None:
    fault, changes = Fault("nan", step=4, num_steps=5), {"max_nonfinite_steps": 6}
    ended = Ranks(2, tmp_path, run, tmp_path, "ddp", fault, changes).wait()
    assert [one.code for one in ended] == [0, 0], errors(ended)


# ---------------------------------------------------------------------------------------- ranks that differ


@pytest.mark.parametrize(
    ("engine", "what", "at_step", "says"),
    [
        also_slow("ddp", "keep", 7, "rank patterns differ between ranks"),
        ("ddp", "keep", STEPS - 1, "rank patterns differ between ranks"),
        ("ddp", "lambda", 7, "lambdas differ between replicas"),
        also_slow("fsdp2", "keep", 7, "rank patterns differ between ranks"),
        also_slow("fsdp2", "keep", STEPS - 1, "rank patterns differ between ranks"),
        also_slow("zero3", "keep", STEPS - 1, "rank patterns differ between ranks"),
    ],
)
def test_ranks_that_differ_publish_nothing(tmp_path: Path, engine: str, what: str, at_step: int, says: str) -> None:
    ended = Ranks(2, tmp_path, run, tmp_path, engine, Fault(), None, corrupt(what, at_step)).wait()
    assert sorted(one.code for one in ended) in ([1, 1], [1, EXIT_PEER]), [one.log for one in ended]
    assert sum(says in one.log for one in ended) == 1 and not list(tmp_path.glob("published-*"))
