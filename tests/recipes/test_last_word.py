"""Under the real launchers, whose own last words follow: the last line on the screen is the cause."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.limits import HANG_SECONDS
from tests.support.paths import ROOT
from tests.support.ranks import free_port
from tests.support.recipe_runs import BIN, run_command

pytest.importorskip("deepspeed")

RECIPE = "recipes/llama_commonsense.py"
LAUNCHERS = {
    "accelerate": "accelerate launch recipes/llama_commonsense.py",
    "accelerate, as a module": f"{sys.executable} -m accelerate.commands.launch {RECIPE}",
    "accelerate, two": f"accelerate launch --config_file launch/accelerate/ddp.yaml --main_process_port PORT {RECIPE}",
    "torchrun": f"torchrun --nproc_per_node 2 --master_port PORT {RECIPE}",
    "deepspeed": "deepspeed launch/summarize_bart.sh",
    "deepspeed, two": "deepspeed --num_accelerators 2 --master_port PORT launch/summarize_bart.sh",
    "bash": "bash launch/summarize_bart.sh",
}
TYPED = ("accelerate", "deepspeed")


@pytest.mark.parametrize(
    "launcher", [name if name in TYPED else pytest.param(name, marks=pytest.mark.slow) for name in LAUNCHERS]
)
def test_the_last_line_is_the_cause(launcher: str) -> None:
    process = run_command(*LAUNCHERS[launcher].replace("PORT", free_port()).split(), "--typo")
    assert process.returncode == (2 if "summarize" in LAUNCHERS[launcher] else 1)
    assert process.stderr.splitlines()[-1] == "error: --typo is not a flag: did you mean --dtype?"
    assert process.stderr.splitlines().count("error: --typo is not a flag: did you mean --dtype?") >= 1
    assert ": error: --typo is not a flag: did you mean --dtype?\n" in process.stderr  # at once, too


@pytest.mark.slow
def test_quiet_launchers_say_nothing_before_and_next_to_nothing_after(tmp_path: Path) -> None:
    """As docs/clusters.md has it: accelerate with its own default configuration, DeepSpeed from bash."""
    said = "error: --typo is not a flag: did you mean --dtype?"
    home = {"HF_HOME": str(tmp_path)}
    assert run_command("accelerate", "config", "default", **home).returncode == 0
    process = run_command("accelerate", "launch", "--quiet", RECIPE, "--typo", **home)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.splitlines() == [f"llama_commonsense.py: {said}", said]
    process = run_command(*LAUNCHERS["bash"].split(), "--typo", DS_ACCELERATOR="cpu")
    assert (process.returncode, process.stderr.splitlines()) == (2, [f"summarize_bart.py: {said}", said])
    assert process.stdout.count("\n") == 1 and "exits with return code = 2" in process.stdout


def test_without_a_launcher_it_is_the_only_line() -> None:
    process = run_command(sys.executable, RECIPE, "--typo")
    assert process.returncode == 2
    assert process.stderr.splitlines() == ["error: --typo is not a flag: did you mean --dtype?"]


def test_on_a_terminal_it_stands_on_a_line_of_its_own() -> None:
    """The launcher has ended, and the shell's prompt is there, when it is repeated."""
    master, terminal = pty.openpty()
    environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        ["accelerate", "launch", RECIPE, "--typo"], cwd=ROOT, env={**os.environ, **environment}, stdout=terminal,
        stderr=terminal, stdin=terminal,
    )  # fmt: skip
    assert process.wait(timeout=HANG_SECONDS) == 1
    os.write(terminal, b"$ ")
    shown = b""
    has_come = False
    # Until the line has come, and then nothing more.
    while select.select([master], [], [], 1 if has_come else HANG_SECONDS)[0]:
        shown += os.read(master, 1 << 16)
        has_come = b"error: " in shown.partition(b"$ ")[2]
    os.close(terminal)
    os.close(master)
    *_, prompt, last = shown.decode().splitlines()
    assert (prompt, last) == ("$ ", "error: --typo is not a flag: did you mean --dtype?")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "accelerate, two", "deepspeed, two"])
def test_so_it_is_after_the_engine_has_started(launcher: str, tmp_path: Path) -> None:
    words = [*LAUNCHERS[launcher].replace("PORT", free_port()).split(), "--output-dir", tmp_path / "run"]
    process = run_command(*words, "--model", "/no/such/model")
    assert process.returncode != 0
    assert process.stderr.splitlines()[-1].startswith("error: "), process.stderr[-2000:]
    assert "/no/such/model" in process.stderr.splitlines()[-1]
