"""From the built wheel, in an environment and a folder of its own: what somebody sees who has no clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.recipe_runs import read_json, run_command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bin folder. The packages that the wheel needs are those of this environment; the wheel itself is its own."""
    folder = tmp_path_factory.mktemp("wheel")

    surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # a clone's is not pip's

    def run(*words: object) -> None:
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, env=surroundings)
        assert done.returncode == 0, done.stderr[-3000:]

    for part in ("adalora_dist", "recipes", "launch", "ds_configs"):  # a build leaves files beside what it builds
        shutil.copytree(ROOT / part, folder / "tree" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, folder / "tree")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "tree")
    [wheel] = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", folder / "venv")
    run(folder / "venv/bin/python", "-m", "pip", "install", "--no-deps", "--no-index", wheel)
    own = folder / "venv" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (own / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin"


def adalora_dist(environment: Path, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return run_command(environment / "adalora-dist", *words, folder=folder, timeout=3000, PYTHONPATH="")


def test_it_lists_copies_and_trains(environment: Path, tmp_path: Path) -> None:
    done = adalora_dist(environment, tmp_path, "ls")
    assert done.returncode == 0 and str(environment.parent) in done.stdout and "llama_sft_demo" in done.stdout
    assert adalora_dist(environment, tmp_path, "cp", "llama_sft", "my_recipe.py").returncode == 0
    done = adalora_dist(environment, tmp_path, "run", "llama_commonsense")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Data: built-in questions") and lines[-2].startswith("Files in runs/latest: ")
    assert lines[-1].startswith("Next: adalora-dist report runs/latest ")
    results = read_json(tmp_path / "runs" / "latest", "results.json")
    assert len(results["after"]) == 2 and read_json(tmp_path / "runs/latest", "run.json")["launcher_command"] == [
        "adalora-dist", "run", "llama_commonsense",
    ]  # fmt: skip


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_several_processes(environment: Path, tmp_path: Path, engine: str) -> None:
    assert adalora_dist(environment, tmp_path, "cp", "gpt2_e2e", "my_recipe.py").returncode == 0
    words = ["run", "my_recipe.py", "--engine", engine, "-n", 2, "--max-steps", 4, "--batch-size", 4]
    done = adalora_dist(environment, tmp_path, *words, "--no-evaluate-before", "--output-dir", "run")
    assert done.returncode == 0, done.stderr[-3000:]
    facts = read_json(tmp_path / "run", "run.json")
    assert (facts["engine"], facts["num_processes"]) == (engine, 2)


@pytest.mark.parametrize("words", [(), ("--engine", "fsdp2", "-n", 2), ("--engine", "zero2", "-n", 2)])
def test_a_typing_error_is_one_line(environment: Path, tmp_path: Path, words: tuple[object, ...]) -> None:
    done = adalora_dist(environment, tmp_path, "run", "llama_commonsense", *words, "--typo")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --typo is not a flag: did you mean --dtype?\n"


def test_a_shipped_configuration_by_name_and_as_in_a_clone(environment: Path, tmp_path: Path) -> None:
    config = "llama_commonsense_llama_7b"
    for name in (config, f"recipes/configs/{config}.yaml"):
        done = adalora_dist(environment, tmp_path, "run", "llama_commonsense", "--config", name, "--dry-run")
        assert done.returncode == 0 and "Dry run" in done.stdout, done.stderr[-3000:]
