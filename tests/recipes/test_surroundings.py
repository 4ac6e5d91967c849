"""Recipes where terminals, working folders, ports and launchers are not as on the developer's machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.limits import HANG_SECONDS, wait_until
from tests.support.paths import ROOT
from tests.support.ranks import free_port
from tests.support.recipe_runs import BIN, run_command
from tests.support.signal_runs import Project

RECIPE = ROOT / "recipes" / "llama_commonsense.py"
FLAGS = "--max-steps 2 --batch-size 4 --init-rank 3 --target-rank 2 --max-eval-rows 2"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In a folder whose name no 7-bit terminal can show."""
    folder = tmp_path_factory.mktemp("surroundings") / "größe ≤ 7 🚀"
    folder.mkdir()
    Project(folder)
    return folder


def arguments(project: Path, output: Path) -> list[str]:
    where = ["--model", project / "model", "--data", project / "data", "--output-dir", output]
    return [*map(str, where), *FLAGS.split()]


@pytest.mark.parametrize(
    "surroundings", [{"PYTHONIOENCODING": "ascii"}, pytest.param({"LC_ALL": "C"}, marks=pytest.mark.slow)]
)
def test_a_terminal_that_cannot_show_what_is_said(project: Path, surroundings: dict[str, str]) -> None:
    """Names, tables and progress bars, of a recipe and of the commands after it; errors, too."""
    output = project / f"run {next(iter(surroundings))} — ü"
    process = run_command(sys.executable, RECIPE, *arguments(project, output), **surroundings)
    assert process.returncode == 0, process.stderr[-3000:]
    inspected = run_command(
        sys.executable, "-m", "adalora_dist", "inspect", output, "--pictures", "none", **surroundings
    )
    assert inspected.returncode == 0 and "Active ranks" in inspected.stdout, inspected.stderr
    again = run_command(sys.executable, RECIPE, *arguments(project, output), **surroundings)
    assert again.returncode == 2 and again.stderr.startswith("error: output_dir="), again.stderr
    for shown in ("--help", "-h"):
        helped = run_command(sys.executable, RECIPE, shown, **surroundings)
        assert helped.returncode == 0 and "--model" in helped.stdout, helped.stderr


@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate", "launch", RECIPE],
        pytest.param(
            [
                *("accelerate", "launch", "--config_file", ROOT / "launch/accelerate/zero2.yaml"),
                *("--num_processes", "1", RECIPE),
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param([ROOT / "launch" / "llama_commonsense.sh"], marks=pytest.mark.slow),
    ],
)
def test_from_another_working_folder(project: Path, tmp_path: Path, launcher: list[str | Path]) -> None:
    pytest.importorskip("deepspeed")
    port = ["--main_process_port", free_port()] if "--num_processes" in launcher else []
    command = [*launcher[:2], *port, *launcher[2:], *arguments(project, Path("run"))]
    process = run_command(*command, folder=tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    assert (tmp_path / "run" / "adapter" / "adapter.json").is_file()


def test_a_deepspeed_configuration_that_is_nowhere(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "no/such.json"}
    process = run_command(sys.executable, RECIPE, "--output-dir", tmp_path / "run", **environment)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("error: deepspeed_config_file no/such.json: no such file")


# ------------------------------------------------------------------------------------------------------------- ports


@pytest.fixture
def taken_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", int(free_port()))) as server:
        yield str(server.getsockname()[1])


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_a_second_launch_on_the_same_port_is_told_the_flag(launcher: str, taken_port: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    if launcher == "deepspeed":
        command = ["deepspeed", "--num_accelerators", 2, "--master_port", taken_port, "launch/llama_commonsense.sh"]
        flag = "--master_port"
    else:
        command = ["accelerate", "launch", "--config_file", "launch/accelerate/ddp.yaml", "--main_process_port"]
        command += [taken_port, RECIPE]
        flag = "--main_process_port"
    process = run_command(*command, "--output-dir", tmp_path / "run")
    if launcher == "accelerate" and process.returncode == 0:  # it finds another port by itself, and says so
        assert f"Port `{taken_port}` is already in use" in process.stderr
        return
    assert process.returncode != 0
    last = process.stderr.splitlines()[-1]
    assert taken_port in last and flag in last, process.stderr[-3000:]


# ---------------------------------------------------------------------------------------- a launcher that is killed


WHEN: dict[str, Callable[[psutil.Process], object]] = {
    "while the interpreter starts": lambda worker: True,
    "while torch is imported": lambda worker: any("libtorch" in one.path for one in worker.memory_maps()),
    "while the processes meet": lambda worker: worker.net_connections("tcp"),
}
"""Of which all workers are to be true."""


@pytest.mark.parametrize("when", [pytest.param(w, marks=[pytest.mark.slow] * ("starts" not in w)) for w in WHEN])
def test_nothing_outlives_a_launcher_that_dies_before_the_watch_begins(when: str, tmp_path: Path) -> None:
    command = [BIN / "accelerate", "launch", "--config_file", "launch/accelerate/ddp.yaml", "--main_process_port"]
    command += [free_port(), "--num_processes", "2", RECIPE, "--output-dir", tmp_path / "run"]
    environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env={**os.environ, **environment}, stdout=log, stderr=log
        )
    process = psutil.Process(launcher.pid)
    wait_until(lambda: len(process.children()) == 2)
    workers = process.children()
    wait_until(lambda: all(WHEN[when](worker) for worker in workers))
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    _, alive = psutil.wait_procs(workers, timeout=HANG_SECONDS)
    for worker in alive:
        worker.kill()
    assert not alive, (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text() and not (tmp_path / "run" / "metrics.jsonl").exists()
