"""Signals to real launchers and their processes: everything ends, and nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from adalora_dist.training.faults.guard import STATUS_FILE
from tests.support.limits import HANG_SECONDS
from tests.support.paths import ROOT
from tests.support.ranks import free_port
from tests.support.recipe_runs import BIN
from tests.support.tiny_project import RECIPE, Project

pytestmark = pytest.mark.slow


class Launched:
    """The recipe on two processes in the middle of training: by torchrun, deepspeed, or accelerate with an engine."""

    def __init__(self, folder: Path, launcher: str) -> None:
        self.output, self.status = folder / "run", folder / "status"
        launchers = ("ACCELERATE_", "FSDP_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "DS_ACCELERATOR")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(launchers)}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", STATUS_FILE: str(self.status)}
        environment |= {"PATH": f"{BIN}:{os.environ['PATH']}"}
        if launcher == "torchrun":
            command: list[Any] = [BIN / "torchrun", "--nproc_per_node", 2, "--master_port", free_port(), RECIPE]
        elif launcher == "deepspeed":
            command = [BIN / "deepspeed", "--num_accelerators", 2, "--master_port", free_port()]
            command += ["launch/llama_commonsense.sh"]
        else:
            command = [BIN / "accelerate", "launch", "--config_file", f"launch/accelerate/{launcher}.yaml"]
            command += ["--num_processes", 2, "--main_process_port", free_port(), RECIPE]
        command += Project(folder).arguments(self.output, "--max-steps", "20000", "--log-every", "1")
        command += ["--no-evaluate-before", "--peer-timeout-seconds", "3"]
        self.log = (folder / "log").open("w+")
        words = [str(word) for word in command]
        self.launcher = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=self.log, stderr=self.log)
        metrics = self.output / "metrics.jsonl"
        deadline = time.monotonic() + HANG_SECONDS
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
            assert self.launcher.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.1)
        self.started = psutil.Process(self.launcher.pid).children(recursive=True)
        ranks, parents = {}, {}
        for process in self.started:
            with contextlib.suppress(psutil.NoSuchProcess):  # what libraries start for a moment ends meanwhile
                parents[process] = process.ppid()
                ranks[process.pid] = process.environ().get("RANK")
        self.workers = [p for p, parent in parents.items() if ranks.get(p.pid) and not ranks.get(parent)]
        assert sorted(ranks[p.pid] for p in self.workers) == ["0", "1"]

    def text(self) -> str:
        return (Path(self.log.name)).read_text()

    def assert_all_gone(self) -> None:
        deadline = time.monotonic() + HANG_SECONDS
        try:
            self.launcher.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            self.launcher.kill()
        _, alive = psutil.wait_procs(self.started, timeout=max(0.1, deadline - time.monotonic()))
        for process in alive:
            process.kill()
        assert not alive and self.launcher.wait() != 0, self.text()


@pytest.mark.parametrize("launcher", ["ddp", "zero3", "torchrun", "deepspeed"])
@pytest.mark.parametrize(("number", "to"), [(signal.SIGTERM, "launcher"), (signal.SIGUSR1, "workers")])
def test_a_signal_saves_and_ends_everything(tmp_path: Path, launcher: str, number: int, to: str) -> None:
    run = Launched(tmp_path, launcher)
    for pid in [run.launcher.pid] if to == "launcher" else [p.pid for p in run.workers]:
        os.kill(pid, number)
    run.assert_all_gone()
    step = json.loads(run.status.read_text())["num_finished_steps"]
    assert f"stopped by a signal after step {step};" in run.text(), run.text()
    assert len((run.output / "metrics.jsonl").read_text().splitlines()) == step


@pytest.mark.parametrize("launcher", ["ddp", "torchrun", "deepspeed"])
def test_a_launcher_that_is_killed_leaves_nothing_behind(tmp_path: Path, launcher: str) -> None:
    run = Launched(tmp_path, launcher)
    os.kill(run.launcher.pid, signal.SIGKILL)
    run.assert_all_gone()
    assert "stopped by a signal after step" in run.text(), run.text()


@pytest.mark.parametrize("which", [0, 1])
def test_a_stopped_worker_ends_everything(tmp_path: Path, which: int) -> None:
    run = Launched(tmp_path, "ddp")
    os.kill(run.workers[which].pid, signal.SIGSTOP)
    run.assert_all_gone()
    assert f"(process {run.workers[which].pid} on " in run.text() and "has not been heard of for " in run.text()
