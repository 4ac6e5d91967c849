"""Run a function on several real ranks (gloo) from a test, in a fraction of a second.

Ranks are forked from the test process, after it has imported torch (and deepspeed, transformers: see
:func:`import_deepspeed`): importing costs 2 to 10 s per process, forking nothing. So a test module imports at its top
whatever its ranks will need. Two conditions make forking safe: the parent never starts a thread pool (one intra-op
thread, no backward pass: run the one-process control through ``run_ranks(1, ...)`` too), and each rank leaves through
``os._exit`` without the parent's exit handlers.

A rank that raises, dies or hangs fails the test, with its traceback or a dump of all its threads.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import pickle
import pkgutil
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo  # which every optimizer would import at its first step
import torch.distributed as dist

import adalora_dist
from tests.support.limits import HANG_SECONDS

torch.set_num_threads(1)
if not torch.accelerator.is_available():
    # The first backward of a process starts a thread for each device that is not the CPU. Under FakeTensorMode a build
    # with CUDA has such devices where there are none, and those threads would keep ranks from being forked after.
    torch.ones((), requires_grad=True).backward()

_GRACE_SECONDS = 5.0  # between the first rank's failure and the end of ranks that wait for it


def import_deepspeed() -> ModuleType:
    """deepspeed, ready for CPU ranks; to be called while a test module is imported, before any fork."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = pytest.importorskip("deepspeed")
    # deepspeed.initialize imports this, and with it torch's compiler: 5 s.
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    # An optional kernel that init_distributed would otherwise compile for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def import_package() -> None:
    """All of the package, for ranks that run a whole recipe; to be called while a test module is imported."""
    for module in pkgutil.walk_packages(adalora_dist.__path__, "adalora_dist."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def free_port() -> str:
    """A port for a rendezvous, outside of the range in which the system picks ports by itself.

    One that the system picked for us could be picked again, for some other test's connection, before it is used.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return str(port)


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = HANG_SECONDS) -> list[Any]:
    """``[fn(rank, world_size, *args) for each rank]``, each in a process of its own with a default gloo group.

    Results must be picklable. Raises:
        AssertionError: a rank raised, died or was still running after ``timeout`` seconds; with every rank's output.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        base = Path(folder)
        running: dict[int, int] = {}
        for rank in range(world_size):
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                _run_rank(base, rank, world_size, fn, args)
            running[pid] = rank
        problems = _wait(running, timeout)
        reported = {rank for rank in range(world_size) if (base / f"{rank}.result").exists()}
        if problems or len(reported) < world_size:
            logs = [f"--- rank {rank}\n{(base / f'{rank}.log').read_text()}" for rank in range(world_size)]
            silent = sorted(set(range(world_size)) - reported)
            raise AssertionError("\n".join([*problems, f"no result from ranks {silent}", *logs]))
        return [pickle.loads((base / f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _wait(running: dict[int, int], timeout: float) -> list[str]:
    """Until all ranks are gone; a failure or the timeout ends the others, which dump their threads."""
    problems: list[str] = []
    deadline = time.monotonic() + timeout
    stopping = False
    while running:
        pid, status = _poll(running)
        if pid:
            rank = running.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if code and not stopping:
                problems.append(f"rank {rank} ended with exit code {code}")
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        elif time.monotonic() > deadline:
            if not problems:
                problems.append(f"ranks {sorted(running.values())} still running after {timeout} s")
            for pid in running:  # once: abort, which faulthandler answers with a dump; then for certain
                os.kill(pid, signal.SIGKILL if stopping else signal.SIGABRT)
            stopping, deadline = True, time.monotonic() + _GRACE_SECONDS
        else:
            time.sleep(0.01)
    return problems


def _poll(running: dict[int, int]) -> tuple[int, int]:
    """(pid, status) of one of our ranks that has ended, else (0, 0)."""
    for pid in running:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return ended, status
    return 0, 0


def _run_rank(base: Path, rank: int, world_size: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The child's whole life. Never returns."""
    code = 1
    log = os.open(base / f"{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    faulthandler.enable(file=sys.stderr, all_threads=True)
    try:
        torch.set_num_threads(1)
        if (state := sys.modules.get("accelerate.state")) is not None:  # of a run in the parent, which was forked
            state.AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT="0", GLOO_SOCKET_IFNAME="lo",
        )  # fmt: skip
        dist.init_process_group(
            "gloo",
            init_method=f"file://{base / 'rendezvous'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=600),  # a hang is the parent's to find, with a dump
        )
        result = fn(rank, world_size, *args)
        dist.barrier()
        partial = base / f"{rank}.partial"
        partial.write_bytes(pickle.dumps(result))
        partial.rename(base / f"{rank}.result")
        dist.destroy_process_group()
        code = 0
    except BaseException:  # a failing test must not unwind into the parent's pytest
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
