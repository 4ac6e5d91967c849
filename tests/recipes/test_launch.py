"""The launch scripts as users type them: bash and Python in one file, under the real DeepSpeed launcher."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adalora_dist.io.errors import UserError
from adalora_dist.training.launch import _take_config, zero_stage
from tests.support.paths import ROOT
from tests.support.ranks import free_port
from tests.support.recipe_runs import read_json, run_command
from tests.support.tiny_text_project import write_summarization, write_t5

pytest.importorskip("deepspeed")

SCRIPTS = sorted(path for path in (ROOT / "launch").glob("*.sh") if path.name != "slurm.sh")
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
FLAGS = "--max-steps 4 --batch-size 4 --init-rank 2 --target-rank 1 --max-new-tokens 6 --max-source-length 64"


def arguments(summaries: Path, output: Path) -> list[str]:
    where = ["--model", summaries / "model", "--data", summaries / "data", "--output-dir", output]
    return [*map(str, where), *FLAGS.split()]


def finished(process: subprocess.CompletedProcess[str], folder: Path, num_processes: int, engine: str) -> None:
    assert process.returncode == 0, process.stderr[-4000:]
    facts = read_json(folder, "run.json")
    assert (facts["engine"], facts["num_processes"], facts["num_steps"]) == (engine, num_processes, 4)
    assert sum(read_json(folder, "rank_pattern.json").values()) == 32
    assert set(read_json(folder, "results.json")["after"]) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}


def test_deepspeed_with_two_processes_and_zero3(summaries: Path, tmp_path: Path) -> None:
    process = run_command(
        "deepspeed", "--num_accelerators", 2, "--master_port", free_port(), "launch/summarize_bart.sh",
        *arguments(summaries, tmp_path / "run"), "--deepspeed-config", "ds_configs/zero3.json",
    )  # fmt: skip
    finished(process, tmp_path / "run", 2, "zero3")


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_deepspeed_as_typed(summaries: Path, tmp_path: Path, num_processes: int) -> None:
    environment = {"LOCAL_SIZE": "2"} if num_processes == 2 else {}
    command = ["deepspeed", "launch/summarize_bart.sh", *arguments(summaries, tmp_path / "run")]
    finished(run_command(*command, **environment), tmp_path / "run", num_processes, "zero2")


@pytest.mark.slow
def test_deepspeed_with_a_t5(tmp_path: Path) -> None:
    write_summarization(tmp_path)
    write_t5(tmp_path)
    command = ["deepspeed", "launch/summarize_bart.sh", *arguments(tmp_path, tmp_path / "run")]
    process = run_command(*command, LOCAL_SIZE="2")
    finished(process, tmp_path / "run", 2, "zero2")
    assert "adapted 32 matrices = " in process.stdout
    verification = read_json(tmp_path / "run", "verification.json")
    assert verification["largest_logit_difference"] < 1e-3 * verification["largest_logit"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [["bash", "launch/summarize_bart.sh"], ["./launch/summarize_bart.sh"]])
def test_bash_as_typed(summaries: Path, tmp_path: Path, command: list[str]) -> None:
    process = run_command(*command, *arguments(summaries, tmp_path / "run"), LOCAL_SIZE="2")
    finished(process, tmp_path / "run", 2, "zero2")


@pytest.mark.slow
def test_without_any_flag_the_demonstration_learns() -> None:
    """The line exactly as typed: pre-trains, trains, writes runs/latest."""
    if (ROOT / "runs" / "latest").exists():
        pytest.skip("runs/latest holds a run")
    try:
        process = run_command("deepspeed", "launch/summarize_bart.sh", timeout=600)
        assert process.returncode == 0, process.stderr[-4000:]
        results = read_json(ROOT / "runs" / "latest", "results.json")
        assert results["before"]["rouge1"] < 30 and results["after"]["rouge1"] > 75
    finally:
        shutil.rmtree(ROOT / "runs" / "latest", ignore_errors=True)


def test_every_recipe_has_a_script_and_every_script_is_both() -> None:
    assert [path.stem for path in SCRIPTS] == [path.stem for path in RECIPES] and len(SCRIPTS) >= 4
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("#!/usr/bin/env bash\n") and path.stat().st_mode & 0o100
        *_, call = ast.parse(text).body  # it is Python
        assert ast.unparse(call) == f"run_recipe('{path.stem}')"
        assert f"deepspeed launch/{path.name}" in text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_flags_pass_through_bash_to_the_recipe(path: Path, tmp_path: Path) -> None:
    """Bash hands its own path and every argument to the launcher; Python hands them to the recipe."""
    run = f'exec {sys.executable} "$1" --local_rank=0 "${{@:2}}"'
    (tmp_path / "deepspeed").write_text(f"#!/usr/bin/env bash\n[[ $1 == --quiet ]] && shift\n{run}\n")
    (tmp_path / "deepspeed").chmod(0o755)
    command = ["bash", path, "--target-rnk", "a b"]
    process = run_command(*command, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert process.returncode == 2 and "did you mean --target-rank" in process.stderr


def test_a_missing_launcher_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "bash").symlink_to(shutil.which("bash") or "/bin/bash")
    process = run_command("bash", "launch/summarize_bart.sh", PATH=str(tmp_path))
    assert process.returncode == 2 and process.stderr.splitlines() == [
        "error: no deepspeed: pip install 'adalora-dist[deepspeed]'"
    ]


def test_the_deepspeed_configuration_is_taken_out_of_the_flags(tmp_path: Path) -> None:
    default = ROOT / "ds_configs" / "zero2.json"
    assert _take_config(["--local_rank=1", "--alpha", "2"], default) == (default, ["--local_rank=1", "--alpha", "2"])
    for words in (["--deepspeed-config", "x.json"], ["--deepspeed_config=x.json"]):
        assert _take_config(["--alpha", "2", *words], default) == (Path("x.json"), ["--alpha", "2"])
    for words in (["--deepspeed-config"], ["--deepspeed-config", "--alpha", "2"]):
        with pytest.raises(UserError, match="--deepspeed-config has no value"):
            _take_config(words, default)
    assert [zero_stage(ROOT / "ds_configs" / f"zero{stage}.json") for stage in (1, 2, 3)] == [1, 2, 3]
    (tmp_path / "broken.json").write_text("{")
    for path in (tmp_path / "broken.json", tmp_path / "missing.json"):
        with pytest.raises(UserError, match="no DeepSpeed configuration"):
            zero_stage(path)
