"""A run that nobody watches: its launcher or the scheduler starts it again, and it becomes what it would have been."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adalora_dist.__main__ import main
from adalora_dist.config.sections import TrainConfig
from adalora_dist.io.ending import EXIT_PREEMPTED
from adalora_dist.io.launchers import RESTARTS, is_restarted
from adalora_dist.training import start as module
from adalora_dist.training.rendezvous import init_method
from adalora_dist.training.restarts import RECORD, count_restart
from adalora_dist.training.start import Placement, start
from tests.support.paths import ROOT
from tests.support.ranks import free_port
from tests.support.recipe_runs import run_command
from tests.support.refusals import refusal
from tests.support.tiny_project import Project

FAILING = ROOT / "tests" / "support" / "restarted_recipe.py"


# --------------------------------------------------------------------------------------------- adalora-dist run, alone


def codes_of(
    monkeypatch: pytest.MonkeyPatch, codes: Sequence[int], flags: Sequence[str] = (), num_restarts: int = 2
) -> tuple[int, list[tuple[list[str], str | None]]]:
    """Its own exit code; flags of the recipe and count of restarts of each attempt. The attempts end with ``codes``."""
    attempts: list[tuple[list[str], str | None]] = []
    left = iter(codes)

    def attempt(words: Sequence[str], environments: Any, patient_with: int) -> int:
        attempts.append((list(words[2:]), environments[0].get(RESTARTS)))
        return next(left)

    monkeypatch.setattr(module, "run_together", attempt)
    monkeypatch.setattr(module, "check_flags", lambda *_: None)  # what the recipe would say of them is not asked here
    with pytest.raises(SystemExit) as ended:
        start("llama_sft", Placement(num_processes=2, num_restarts=num_restarts), flags, ["x"])
    assert isinstance(ended.value.code, int)
    return ended.value.code, attempts


@pytest.mark.parametrize(
    ("codes", "code", "num_attempts"),
    [
        ((0,), 0, 1),
        ((137, 0), 0, 2),  # killed
        ((1, 76, 0), 0, 3),  # an error, and one that follows from another's
        ((1, 1, 1), 1, 3),  # no more than that
        ((2,), 2, 1),  # a mistake
        ((1, EXIT_PREEMPTED), EXIT_PREEMPTED, 2),  # told to end
        ((130,), 130, 1),
        ((143,), 143, 1),
    ],
)
def test_after_which_codes_it_starts_again(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    codes: Sequence[int],
    code: int,
    num_attempts: int,
) -> None:
    ended, attempts = codes_of(monkeypatch, codes)
    assert ended == code and len(attempts) == num_attempts
    assert [count for _, count in attempts] == [None, "1", "2"][:num_attempts]
    assert all(flags == ["--resume", "auto"] for flags, _ in attempts)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"adalora-dist run: ended with code {codes[k]}; restart {k + 1} of 2" for k in range(num_attempts - 1)
    ]


def test_flags_of_a_run_that_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in (["--resume", "auto"], ["--resume=auto"], ["--resume", "never", "--resume=auto"]):
        assert codes_of(monkeypatch, [0], flags)[1][0][0] == flags
    for flags in (["--resume", "never"], ["--resume=runs/x"], ["--resume"]):
        said = refusal(start, "llama_sft", Placement(num_restarts=1), flags, ["x"])
        assert said.startswith("--restarts with --resume ") and "leave --resume out" in said
    said = refusal(start, "llama_sft", Placement(num_nodes=2, num_restarts=1), [], ["x"])
    assert "torchrun --max-restarts" in said and "--nodes 2" in said


def test_the_command_hands_its_option_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "run_together", lambda *_: 0)
    with pytest.raises(SystemExit) as ended:
        main(["run", "llama_sft", "--seed", "3", "--restarts", "4"])
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        main(["run", "llama_sft", "--restarts", "-1"])
    assert ended.value.code == 2 and "-1 must be an integer >= 0" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- how often


COUNTS = ["ADALORA_DIST_RESTARTS", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"]


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COUNTS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", COUNTS)
def test_whoever_starts_again_says_so(name: str) -> None:
    assert not any(is_restarted(environment) for environment in ({}, {name: "0"}, {name: ""}))
    assert is_restarted({name: "1"})


def test_restarts_at_the_same_step_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = TrainConfig(output_dir=str(tmp_path / "run"), max_restarts_at_step=2)
    monkeypatch.setenv(RESTARTS, "1")
    for step in (0, 0, 40, 40):  # what was done in between counts from the start
        count_restart(train, step)
    said = refusal(count_restart, train, 40)
    assert "max_restarts_at_step=2" in said and "started again 2 time(s) after step 40" in said
    assert "max_restarts_at_step=2" in refusal(count_restart, train, 40)
    monkeypatch.delenv(RESTARTS)
    count_restart(train, 40)  # by hand
    assert not (tmp_path / "run" / RECORD).exists()
    monkeypatch.setenv(RESTARTS, "1")
    count_restart(train, 40)
    none = train.model_copy(update={"max_restarts_at_step": 0})
    assert "max_restarts_at_step=0" in refusal(count_restart, none, 40)


@pytest.mark.parametrize("content", ["", "[]", '{"step": 5}', '{"step": 5, "count": "x"}', '{"step": [], "count": {}}'])
def test_a_record_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    (tmp_path / RECORD).write_text(content)
    monkeypatch.setenv(RESTARTS, "1")
    count_restart(TrainConfig(output_dir=str(tmp_path)), 5)
    assert json.loads((tmp_path / RECORD).read_text()) == {"step": 5, "count": 1}


def test_only_a_second_attempt_of_torchs_agent_meets_elsewhere() -> None:
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert init_method(agent) == {"init_method": "adalora-dist://"}
    for change in ({"TORCHELASTIC_RESTART_COUNT": "0"}, {"TORCHELASTIC_USE_AGENT_STORE": "False"}):
        assert init_method({**agent, **change}) == {}
    assert init_method({}) == {}


# --------------------------------------------------------------------------------------- whole runs, bit for bit

pytestmark = pytest.mark.timeout(1200)
ENGINES = ("ddp", "fsdp2", "zero3")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("restarts"))


def flags(project: Project, name: str, *more: str) -> list[str]:
    own = ("--checkpoint-every", "3", "--no-evaluate-before", "--export-formats", "lora", "--resume", "auto")
    return project.arguments(project.path / name, *own, *more)


def undisturbed(project: Project, engine: str) -> Path:
    folder = project.path / engine
    if not folder.exists():
        done = own(project, engine, engine)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def own(project: Project, engine: str, name: str, *more: str, fails: str = "") -> Any:
    words = [sys.executable, "-m", "adalora_dist", "run", FAILING, "--engine", engine, "-n", 2]
    return run_command(*words, *flags(project, name, *more), FAILS=fails)


def assert_equal(one: Path, other: Path) -> None:
    """The losses of all steps, all selections, and every tensor of the adapter, bit for bit."""
    lines = [[json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, other)]
    assert [x["loss"] for x in lines[0]] == [x["loss"] for x in lines[1]]
    assert (one / "allocations.jsonl").read_text() == (other / "allocations.jsonl").read_text()
    tensors = [load_file(run / "adapter" / "adapter.safetensors") for run in (one, other)]
    assert tensors[0].keys() == tensors[1].keys() and all(torch.equal(t, tensors[1][k]) for k, t in tensors[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_adalora_dist_run_starts_it_again(project: Project, engine: str) -> None:
    expected, name = undisturbed(project, engine), f"{engine}-own"
    done = own(project, engine, name, "--restarts", "1", fails="0:10:9")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ended with code 137; restart 1 of 1" in done.stderr
    assert "Continuing after step 9 from" in done.stdout
    assert_equal(project.path / name, expected)
    assert json.loads((project.path / name / RECORD).read_text()) == {"step": 9, "count": 1}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_torchruns_agent_starts_it_again(project: Project, engine: str) -> None:
    """And with it accelerate's launcher, which is torchrun with another name."""
    expected, name = undisturbed(project, engine), f"{engine}-elastic"
    words = ["accelerate", "launch", "--config_file", f"launch/accelerate/{engine}.yaml", "--num_processes", 2]
    words += ["--main_process_port", free_port(), "--max_restarts", 2, FAILING]
    if engine == "ddp":
        words = ["torchrun", "--nproc_per_node", 2, "--master_port", free_port(), "--max-restarts", 2, FAILING]
    done = run_command(*words, *flags(project, name), FAILS="1:10:9" if engine == "zero3" else "0:10:9")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Continuing after step 9 from" in done.stdout
    assert_equal(project.path / name, expected)


SLURM = {
    "scontrol": 'if [[ $1 == requeue ]]; then echo queued >>"$QUEUE"; else printf "127.0.0.1\\n"; fi',
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexport SLURM_NODEID=0\nexec "$@"',
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_slurm_queues_it_again(project: Project, tmp_path: Path, number: int) -> None:
    """After a failure, with RESTARTS, and after its signal; the scheduler is this test."""
    expected, name, queue = undisturbed(project, "ddp"), f"slurm-{number}", tmp_path / "queue"
    for command, body in SLURM.items():
        (tmp_path / command).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / command).chmod(0o755)
    environment = {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n",
        "SLURM_JOB_NUM_NODES": "1", "PROCESSES_PER_NODE": "2", "SLURM_CPUS_ON_NODE": "2", "QUEUE": str(queue),
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RESTARTS": "1" if number == signal.SIGKILL else "0",
    }  # fmt: skip
    words = ["bash", "launch/slurm.sh", "launch/accelerate/ddp.yaml", FAILING, *flags(project, name)]
    first = run_command(*words, **environment, FAILS=f"0:10:{int(number)}")
    assert first.returncode != 0 and queue.read_text() == "queued\n", first.stderr[-3000:]
    again = run_command(*words, **environment, SLURM_RESTART_COUNT="1")
    assert again.returncode == 0 and queue.read_text() == "queued\n", again.stderr[-3000:]
    assert "Continuing after step" in again.stdout
    assert_equal(project.path / name, expected)
