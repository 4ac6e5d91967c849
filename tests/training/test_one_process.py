"""Recipes called one after the other in one process, as in a notebook."""

from __future__ import annotations

import runpy
import signal
from pathlib import Path

import pytest

from adalora_dist.io.errors import UserError
from tests.support.recipe_runs import run_command
from tests.support.tiny_project import RECIPE, Project


def runs_after_an_error(folder: Path) -> None:
    """Three runs in one folder, of which the first one's error is caught."""
    recipe, project = runpy.run_path(str(RECIPE)), Project(folder)
    handler = signal.getsignal(signal.SIGTERM)

    def run(*flags: str) -> None:
        arguments = project.arguments(folder / "run", "--max-steps", "2")
        recipe["main"](recipe["configuration"]([*arguments, "--no-evaluate-before", *flags]))
        assert (folder / "run" / "results.json").is_file() and signal.getsignal(signal.SIGTERM) == handler

    with pytest.raises(UserError, match="cannot be loaded"):
        run("--model", str(project.data))
    run()
    run("--overwrite", "--precision", "bf16")
    print("all three")


def test_a_run_after_one_whose_error_was_caught(tmp_path: Path) -> None:
    """It takes the folder over, and may compute in another precision; in the end nobody listens for signals."""
    call = f"runs_after_an_error(Path({str(tmp_path)!r}))"
    done = run_command("python", "-c", f"from {__name__} import *; {call}")
    assert done.returncode == 0 and done.stdout.endswith("all three\n"), done.stderr
