"""adalora-dist run: the environment that accelerate's launcher would make, and not a word besides the run's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from adalora_dist.io.launchers import OWN_COMMAND
from adalora_dist.io.shipped import files_of
from adalora_dist.training import run_folder
from adalora_dist.training import start as module
from adalora_dist.training.asked_for import copies_asked_for, engine_said
from adalora_dist.training.recipe_file import recipe_file
from adalora_dist.training.start import Placement, engine_environment, environments_of, start
from tests.support.paths import DS_CONFIGS, ROOT
from tests.support.ranks import free_port
from tests.support.recipe_runs import run_command
from tests.support.refusals import refusal

SLURM = {"SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}


@pytest.mark.parametrize("path", files_of("engine"), ids=lambda path: path.stem)
def test_an_engine_is_what_accelerate_makes_of_its_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    monkeypatch.chdir(ROOT)
    words = ["--config_file", str(path), "--main_process_port", free_port(), "recipes/llama_sft.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    arguments.deepspeed_fields_from_accelerate_config = ""  # as its command does in between
    theirs = prepare_deepspeed_cmd_env(arguments)[1] if "zero" in path.stem else prepare_multi_gpu_env(arguments)
    own = engine_environment(path.stem)
    for name, value in own.items():
        assert value == theirs[name], name
    switches = {name for name in theirs if name.startswith("ACCELERATE_USE_") and theirs[name] == "true"}
    assert switches == {name for name in own if name.startswith("ACCELERATE_USE_")}


def test_one_process_needs_nothing() -> None:
    assert environments_of(Placement(), {"OMP_NUM_THREADS": "1"}) == [{}]
    [alone] = environments_of(Placement(), {})
    assert set(alone) == {"OMP_NUM_THREADS"}


def test_several_on_one_machine() -> None:
    first, second = environments_of(Placement(num_processes=2), {})
    assert (first["RANK"], second["RANK"], second["LOCAL_RANK"], second["WORLD_SIZE"]) == ("0", "1", "1", "2")
    assert first["MASTER_PORT"] == second["MASTER_PORT"] and "ACCELERATE_USE_FSDP" not in first
    [only] = environments_of(Placement("fsdp2"), {})
    assert (only["RANK"], only["WORLD_SIZE"], only["FSDP_VERSION"]) == ("0", "1", "2")


def test_copies_of_the_weights() -> None:
    """HSDP: one on each machine, or two."""
    sizes = ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE")
    placements = {(4, 1): ("2", "2"), (6, 1): ("2", "3"), (2, 3): ("3", "2")}
    for (num_processes, num_nodes), expected in placements.items():
        own = environments_of(Placement("hsdp", num_processes, num_nodes, 0, "head"), {})[-1]
        assert tuple(own[name] for name in sizes) == expected and own["FSDP_VERSION"] == "2"
        assert str(copies_asked_for(own)) == expected[0] and engine_said("fsdp2", own) == "hsdp"
    [plain, _] = environments_of(Placement("fsdp2", 2), {})
    assert copies_asked_for(plain) == 1 and engine_said("fsdp2", plain) == "fsdp2"


def test_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    placed = Placement("fsdp2", 4, 3, 2, "10.0.0.1")
    ranks = environments_of(placed, {})
    assert [own["RANK"] for own in ranks] == ["8", "9", "10", "11"] and ranks[0]["WORLD_SIZE"] == "12"
    assert (ranks[0]["MASTER_ADDR"], ranks[0]["MASTER_PORT"]) == ("10.0.0.1", "29500")
    [own] = environments_of(placed._replace(num_processes=1, address="head:1234"), {})
    assert (own["MASTER_ADDR"], own["MASTER_PORT"]) == ("head", "1234")
    monkeypatch.setattr(module, "_first_host", lambda nodes: {"n[1-2]": "n1"}[nodes])
    [own] = environments_of(Placement("ddp", 1, 2), SLURM)
    assert (own["RANK"], own["MASTER_ADDR"]) == ("1", "n1")
    [own] = environments_of(Placement(), SLURM)  # several machines are asked for, never assumed
    assert "RANK" not in own
    for of_one in (Placement("ddp", 1, 1), Placement("ddp", 1, 1, 0, "head")):  # as a job file for any number has it
        [own] = environments_of(of_one, SLURM)
        assert (own["RANK"], own["WORLD_SIZE"], own["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


@pytest.mark.parametrize(
    ("placement", "says"),
    [
        (Placement("single", 2), "--engine single with 2 processes"),
        (Placement("fsdp", 2), "fsdp is not an engine: did you mean fsdp2 or hsdp?"),
        (Placement("tensor", 2), "tensor is not an engine: choose from single, ddp, fsdp2, hsdp, zero2, zero3; "),
        (Placement("hsdp", 3), "hsdp on 1 machine(s) with 3 process(es): each machine has a copy of the weights"),
        (Placement("hsdp", 2), "hsdp on 1 machine(s) with 2 process(es)"),
        (Placement("hsdp", 1, 4, 0, "a"), "hsdp on 4 machine(s) with 1 process(es)"),
        (Placement("fsdp2", deepspeed_config=DS_CONFIGS / "zero1.json"), "choose zero2 or zero3"),
        (Placement("zero2", deepspeed_config=Path("none.json")), "no DeepSpeed configuration"),
        (Placement("ddp", 1, 2), "--nodes 2 without --node-rank K"),
        (Placement("ddp", 1, 2, 1), "--nodes 2 without --main-address HOST"),
        (Placement("ddp", 1, 2, 2, "a"), "--node-rank 2 of --nodes 2: must be 0 to 1"),
        (Placement("ddp", 1, 2, 1, "a:0"), "the port must be an integer from 1 to 65535"),
        (Placement("ddp", 1, node_rank=1), "--node-rank 1 without --nodes: say how many"),
        (Placement("ddp", 1, address="a"), "--main-address a without --nodes: say how many"),
        (Placement("ddp", 1, 1, 1, "a"), "--node-rank 1 of --nodes 1: must be 0 to 0"),
    ],
)
def test_what_does_not_say_where_is_refused(placement: Placement, says: str) -> None:
    assert says in refusal(environments_of, placement, {})


def test_a_configuration_of_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for engine, name, starts_sharded in (("zero2", "zero1.json", "false"), ("zero3", "zero3_offload.json", "true")):
        own = engine_environment(engine, Path("ds_configs") / name)
        assert own["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == starts_sharded
        assert own["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == str(DS_CONFIGS / name)


@pytest.mark.parametrize(
    ("engine", "name", "says"),
    [
        ("zero2", "zero3.json", "zero3.json, whose zero_optimization.stage is 3: choose zero3, or another file"),
        ("zero3", "zero2.json", "zero2.json, whose zero_optimization.stage is not 3: set it, or choose zero2"),
        ("fsdp2", "zero3.json", "choose zero2 or zero3"),
    ],
)
def test_a_configuration_of_another_engine_is_refused(engine: str, name: str, says: str) -> None:
    said = refusal(engine_environment, engine, DS_CONFIGS / name)
    assert f"--engine {engine}" in said and said.endswith(says)


def test_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_file("llama_sft") == recipe_file("recipes/llama_sft.py") == ROOT / "recipes" / "llama_sft.py"
    (tmp_path / "my_recipe.py").touch()
    assert recipe_file("my_recipe.py") == Path("my_recipe.py")
    assert "llama_sfd is not a recipe: did you mean llama_sft?" in refusal(recipe_file, "llama_sfd")
    assert refusal(recipe_file, "my_recipe").endswith("did you mean my_recipe.py?")
    (tmp_path / "llama_sft.py").touch()  # as adalora-dist cp names it
    assert recipe_file("llama_sft") == ROOT / "recipes" / "llama_sft.py"


def test_the_commit_is_that_of_this_clone_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("git"):
        pytest.skip("no git here")
    here = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert run_folder._commit() == (here.stdout.strip() or None)
    assert run_folder._provenance()["versions"]["torch"] == torch.__version__
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    monkeypatch.setattr(run_folder, "ROOT", tmp_path / "site-packages" / "adalora_dist" / "_shipped")
    assert run_folder._commit() is None
    monkeypatch.setattr(run_folder, "ROOT", ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_folder._commit() is None and run_folder._provenance()["commit"] is None


def test_several_processes_are_not_started_to_find_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[int] = []

    def count(words: Sequence[str], environments: Sequence[Mapping[str, str]], patient_with: int) -> int:
        started.append(len(environments))
        return 0

    def code_of(recipe: str | Path, placement: Placement) -> object:
        with pytest.raises(SystemExit) as ended:
            start(str(recipe), placement, ["--typo"], ["x"])
        return ended.value.code

    monkeypatch.setattr(module, "run_together", count)
    before, two, own = list(sys.path), Placement(num_processes=2), tmp_path / "own.py"
    (tmp_path / "beside_own.py").write_text("from recipes.llama_sft import configuration as theirs")
    guarded = "def configuration(argv):\n    return theirs(argv)\nif __name__ == '__main__':\n    1 / 0\n"
    own.write_text(f"from beside_own import theirs\n{guarded}")
    for recipe in ("llama_sft", own):
        assert code_of(recipe, two) == 2
        assert capsys.readouterr().err == "error: --typo is not a flag: did you mean --dtype?\n"
    assert started == [] and sys.path == before
    for text in (f"1 / 0\n{guarded}", "def configuration(argv):\n    pass\n1 / 0\n", "1 / 0\n"):
        own.write_text(text)  # what is wrong in it, or runs at once, is for its processes
        assert code_of(own, two) == 0
    assert code_of("llama_sft", Placement("ddp", 2, 2, 1, "there")) == 0  # machine 0 tells
    assert started == [2] * 4 and sys.path == before


def test_a_recipe_takes_the_place_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from adalora_dist.__main__ import main

    calls = []
    monkeypatch.setattr(os, "execve", lambda *words: calls.append(words))
    with pytest.raises(SystemExit):  # it is gone where it is not a test's
        main(["run", "llama_sft", "--engine", "zero2", "--seed", "3", "-n", "1", "--epochs=-1"])
    [(program, words, environment)] = calls
    assert program == sys.executable
    assert words[1:] == [str(ROOT / "recipes/llama_sft.py"), "--seed", "3", "--epochs=-1"]
    typed = ["adalora-dist", "run", "llama_sft", "--engine", "zero2", "--seed", "3", "-n", "1", "--epochs=-1"]
    assert json.loads(environment[OWN_COMMAND]) == typed
    monkeypatch.setenv(OWN_COMMAND, environment[OWN_COMMAND])
    monkeypatch.setattr(run_folder, "launchers", lambda: [])
    assert run_folder._launcher_command() == typed


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_typing_error_is_one_line(tmp_path: Path, processes: str) -> None:
    words = ["run", "llama_commonsense", "-n", processes, "--typo"]
    done = run_command(sys.executable, "-m", "adalora_dist", *words, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --typo is not a flag: did you mean --dtype?\n"
    assert list(tmp_path.iterdir()) == []
