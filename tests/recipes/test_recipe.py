"""The commonsense recipe as users start it: real launchers, one process and two, and the mistakes that users make."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.utils import is_tensorboard_available
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from adalora_dist.artifacts.export import load_adapter
from adalora_dist.config.sections import TrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.tasks.commonsense.config import CommonsenseConfig
from adalora_dist.training.engine import build_accelerator
from adalora_dist.training.run_folder import RunFolder
from tests.support.paths import ROOT, shared
from tests.support.ranks import free_port, import_package, run_ranks
from tests.support.recipe_runs import BIN, Run, finished, run_command
from tests.support.tiny_project import (
    INIT_RANK,
    MATRICES,
    RECIPE,
    STEPS,
    TARGET_RANK,
    Project,
)

import_package()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([ids])).logits.float()


# ---------------------------------------------------------------------------------------------------- one process


@pytest.fixture(scope="module")
def single(project: Project) -> tuple[Run, str]:
    """The run that others are compared with, and what it printed."""
    folder = project.path / "single"
    trackers = ["--trackers", "tensorboard"] if is_tensorboard_available() else []
    process = run_command(BIN / "accelerate", "launch", RECIPE, *project.arguments(folder, *trackers))
    return finished(folder, process), process.stdout


def test_budget_is_met_and_every_step_recorded(single: tuple[Run, str]) -> None:
    run, printed = single
    budget = TARGET_RANK * MATRICES
    assert len(run.pattern) == MATRICES and sum(run.pattern.values()) == budget
    assert len(set(run.pattern.values())) > 1
    assert f"Total rank {budget}, budget {budget}" in printed
    assert [record["step"] for record in run.metrics] == list(range(STEPS))
    assert run.metrics[0]["budget"] == INIT_RANK * MATRICES and run.metrics[-1]["budget"] == budget
    assert run.losses[-5:].mean() < run.losses[:5].mean() - 0.5
    allocations = [json.loads(line) for line in (run.folder / "allocations.jsonl").read_text().splitlines()]
    assert [a["step"] for a in allocations] == [m["step"] for m in run.metrics if m["allocated"]]
    assert allocations[-1]["ranks"] == list(run.pattern.values())


def test_run_folder_says_what_was_run(single: tuple[Run, str], project: Project) -> None:
    run, _ = single
    expected = {"engine": "single", "num_processes": 1, "num_steps": STEPS, "num_matrices": MATRICES}
    assert {key: run.facts[key] for key in expected} == expected
    assert run.facts["versions"]["torch"] == torch.__version__ and "accelerate" in run.facts["versions"]
    assert str(project.model) in run.facts["command"]
    again = CommonsenseConfig.model_validate(yaml.safe_load((run.folder / "config.yaml").read_text()))
    assert (again.model.name, again.train.max_steps) == (str(project.model), STEPS)


def test_results_are_those_of_all_tasks_and_methods(single: tuple[Run, str]) -> None:
    run, printed = single
    for when in ("before", "after"):
        cases = [(r["task"], r["method"], r["num_rows"]) for r in run.results[when]]
        tasks, methods = ("boolq", "openbookqa"), ("likelihood", "generation")
        assert cases == [(task, method, 5) for task in tasks for method in methods]
    assert "boolq" in printed and "model.layers.1" in printed  # the two tables


def test_exports_say_the_same_in_plain_transformers(single: tuple[Run, str], project: Project) -> None:
    run, _ = single
    merged = AutoModelForCausalLM.from_pretrained(run.folder / "merged")
    adapted = AutoModelForCausalLM.from_pretrained(project.model)
    plain = AutoModelForCausalLM.from_pretrained(project.model)
    load_adapter(adapted, run.folder / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "merged")
    ids = tokenizer("Please answer with true or false, question: is the river alive?")["input_ids"]
    expected = logits(adapted, ids)
    assert (logits(merged, ids) - expected).abs().max() < 1e-4
    assert (logits(plain, ids) - expected).abs().max() > 0.1


@pytest.mark.skipif(not is_tensorboard_available(), reason="tensorboard is not installed")
def test_tensorboard_gets_every_step(single: tuple[Run, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = single
    series, tags = {}, set()
    for file in run.folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        series |= {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        tags |= set(events.Tags()["histograms"])
    assert [event.step for event in series["loss"]] == list(range(STEPS))
    assert [event.value for event in series["loss"]] == pytest.approx(run.losses.tolist())
    assert {"learning_rate", "budget", "gradient_norm", "orthogonality", "peak_memory_gib", "max_rank"} <= series.keys()
    assert "ranks" in tags


# ---------------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        *(("ddp", "ddp"), ("fsdp2", "fsdp2"), ("zero3", "zero3")),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("zero2", "zero2"), ("torchrun", "ddp"))),
        pytest.param("hsdp", "hsdp", marks=pytest.mark.slow),
    ],
)
def test_several_processes_do_what_one_does(
    project: Project, single: tuple[Run, str], launcher: str, engine: str
) -> None:
    num_processes = 4 if engine == "hsdp" else 2
    if launcher == "torchrun":
        command: list[Any] = [BIN / "torchrun", "--nproc_per_node", 2, "--master_port", free_port()]
    else:
        config = f"launch/accelerate/{launcher}.yaml"
        command = [BIN / "accelerate", "launch", "--config_file", config, "--num_processes", num_processes]
        command += ["--main_process_port", free_port()]
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    folder = project.path / launcher
    run = finished(folder, run_command(*command, RECIPE, *project.arguments(folder)))
    expected, _ = single
    assert (run.facts["engine"], run.facts["num_processes"]) == (engine, num_processes)
    assert run.pattern == expected.pattern
    torch.testing.assert_close(run.losses, expected.losses, rtol=0, atol=1e-4)
    assert run.results == expected.results
    for name in ("gradient_norm", "orthogonality", "importance_spread"):  # whatever part of it a process has
        theirs = [record[name] for record in expected.metrics if name in record]
        assert theirs and [record[name] for record in run.metrics if name in record] == pytest.approx(theirs, rel=1e-2)
    tokens = [1, 7, 9, 11]
    models = [AutoModelForCausalLM.from_pretrained(r.folder / "merged") for r in (run, expected)]
    assert (logits(models[0], tokens) - logits(models[1], tokens)).abs().max() < 1e-2


def test_processes_that_accelerate_did_not_start_are_missed(project: Project, tmp_path: Path) -> None:
    """On CPU without MPI, --cpu --num_processes 2 starts one process and says nothing."""
    process = run_command(
        BIN / "accelerate", "launch", "--cpu", "--num_processes", 2, "--main_process_port", free_port(),
        RECIPE, *project.arguments(tmp_path / "run"),
    )  # fmt: skip
    assert process.returncode != 0
    [line] = [line for line in process.stderr.splitlines() if line.startswith("error:")]
    assert "asked for several processes but started one" in line and "launch/accelerate/ddp.yaml" in line
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------- other ways to run it


def run_recipe(rank: int, world_size: int, arguments: list[str], environment: dict[str, str]) -> tuple[Any, str]:
    """The recipe's file as the main program of this (forked) process: its exit code and standard error."""
    dist.barrier()  # a rank that left while another still connects would break it
    dist.destroy_process_group()  # the recipe makes its own, and ends it
    os.environ.update(environment)
    sys.argv = [str(RECIPE), *arguments]
    errors = io.StringIO()
    code: Any = 0
    with contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(str(RECIPE), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code
    if not dist.is_initialized():  # run_ranks wants one
        with tempfile.NamedTemporaryFile() as rendezvous:
            dist.init_process_group("gloo", init_method=f"file://{rendezvous.name}", rank=rank, world_size=world_size)
    return code, errors.getvalue()


@pytest.mark.filterwarnings("default:.*continuing from step-00000012")
def test_a_run_that_was_interrupted_continues(project: Project, tmp_path: Path) -> None:
    """Its last checkpoint is gone, as is what came after it; what an interrupted export left is in the way."""
    formats = ("--export-formats", "merged", "lora", "peft")
    arguments = project.arguments(tmp_path / "run", "--checkpoint-every", "12", *formats)
    [(code, errors)] = run_ranks(1, run_recipe, arguments, {})
    assert code == 0, errors
    whole = Run(tmp_path / "run")
    adapter = (tmp_path / "run" / "adapter" / "adapter.safetensors").read_bytes()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000012", f"step-{STEPS:08d}"]
    (checkpoints / f"step-{STEPS:08d}" / "state.json").unlink()
    [(code, errors)] = run_ranks(1, run_recipe, [*arguments, "--resume", "auto"], {})
    assert code == 0, errors
    again = Run(tmp_path / "run")
    assert again.facts["first_step"] == 12 and "first_step" not in whole.facts
    assert torch.equal(again.losses, whole.losses) and len(again.losses) == STEPS
    assert (again.results, again.pattern) == (whole.results, whole.pattern)
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").read_bytes() == adapter
    [(code, errors)] = run_ranks(1, run_recipe, arguments, {})
    assert code == 2 and "--resume auto" in errors


def test_plain_lora(project: Project, tmp_path: Path) -> None:
    formats = ("--export-formats", "merged", "lora", "peft")
    arguments = project.arguments(tmp_path / "run", "--method", "lora", "--no-evaluate-before", *formats)
    [(code, errors)] = run_ranks(1, run_recipe, arguments, {})
    assert code == 0, errors
    run = Run(tmp_path / "run")
    assert set(run.pattern.values()) == {INIT_RANK} and run.results["before"] == []
    adapted = AutoModelForCausalLM.from_pretrained(project.model)
    load_adapter(adapted, run.folder / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(run.folder / "merged")
    assert (logits(adapted, [1, 7, 9]) - logits(merged, [1, 7, 9])).abs().max() < 1e-4
    for form in ("lora", "peft"):
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(project.model), run.folder / form)
        assert (logits(loaded.eval(), [1, 7, 9]) - logits(merged, [1, 7, 9])).abs().max() < 1e-4


def test_real_model_and_data(tmp_path: Path) -> None:
    model, data = shared("models/stories260k"), shared("data/commonsense")
    process = run_command(
        sys.executable, RECIPE, "--model", model, "--data", data, "--tasks", "arc_easy", "--max-steps", 10,
        "--max-train-rows", 40, "--max-eval-rows", 6, "--batch-size", 4, "--init-rank", 4, "--target-rank", 2,
        "--max-length", 96, "--learning-rate", 1e-2, "--output-dir", tmp_path / "run",
    )  # fmt: skip
    run = finished(tmp_path / "run", process)
    assert sum(run.pattern.values()) == 2 * len(run.pattern) and len(run.metrics) == 10
    assert run.losses[-5:].mean() < run.losses[:5].mean()
    adapted = AutoModelForCausalLM.from_pretrained(model)
    load_adapter(adapted, run.folder / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(run.folder / "merged")
    ids = AutoTokenizer.from_pretrained(model)("Once upon a time")["input_ids"]
    assert (logits(adapted, ids) - logits(merged, ids)).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------------------- mistakes


def with_bad_row(number: int, line: str) -> Callable[[Project, Path], list[str]]:
    def arguments(project: Project, folder: Path) -> list[str]:
        shutil.copytree(project.data, folder / "data")
        file = folder / "data" / "boolq" / "train.jsonl"
        lines = file.read_text().splitlines()
        lines[number - 1] = line
        file.write_text("\n".join(lines) + "\n")
        return ["--data", str(folder / "data")]

    return arguments


def with_model(change: Callable[[Path], None]) -> Callable[[Project, Path], list[str]]:
    def arguments(project: Project, folder: Path) -> list[str]:
        shutil.copytree(project.model, folder / "model")
        change(folder / "model")
        return ["--model", str(folder / "model")]

    return arguments


def only_pickled_weights(folder: Path) -> None:
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def without_file(name: str) -> Callable[[Project, Path], list[str]]:
    def arguments(project: Project, folder: Path) -> list[str]:
        shutil.copytree(project.data, folder / "data")
        (folder / "data" / name).unlink()
        return ["--data", str(folder / "data")]

    return arguments


def used_output_dir(project: Project, folder: Path) -> list[str]:
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("model: {}\n")
    return []


def output_dir_is_a_file(project: Project, folder: Path) -> list[str]:
    (folder / "file").write_text("")
    return ["--output-dir", str(folder / "file")]


def flags(*words: str) -> Callable[[Project, Path], list[str]]:
    return lambda project, folder: list(words)


MISTAKES = {
    "unknown target": (flags("--targets", "q_prj"), ["targets", "q_prj", "q_proj"]),
    "target that is no linear map": (flags("--targets", "embed_tokens"), ["embed_tokens", "Embedding"]),
    "no data folder": (flags("--data", "no/such/folder"), ["no/such/folder", "no such folder"]),
    "row without its answer": (
        with_bad_row(3, '{"instruction": "Is it?", "input": "", "output": "yes"}'),
        ["boolq/train.jsonl:3", "answer"],
    ),
    "row that is no JSON": (with_bad_row(2, "{instruction: x}"), ["boolq/train.jsonl:2", "JSON"]),
    "answer that is no choice": (
        with_bad_row(1, '{"instruction": "Is it?", "input": "", "output": "maybe", "answer": "maybe"}'),
        ["boolq/train.jsonl:1", "maybe", "true, false"],
    ),
    "task without training rows": (without_file("openbookqa/train.jsonl"), ["openbookqa", "train.jsonl"]),
    "task that the source lacks": (flags("--tasks", "piqa"), ["piqa", "boolq, openbookqa"]),
    "task that does not exist": (flags("--tasks", "boolk"), ["boolk", "boolq"]),
    "no room for the answer": (
        with_bad_row(5, json.dumps({"instruction": "Is it?", "input": "", "answer": "true", "output": "true " * 40})),
        ["boolq/train.jsonl:5", "max_length=32"],
    ),
    "phases longer than the epochs": (
        flags("--max-steps", "none", "--epochs", "2", "--initial-warmup-steps", "4", "--final-steps", "4"),
        ["initial_warmup_steps=4", "final_steps=4", "6 optimizer steps"],
    ),
    "phases longer than the run": (
        flags("--initial-warmup-steps", "10", "--final-steps", "10"),
        ["initial_warmup_steps 10", "final_steps 10", "max_steps 20"],
    ),
    "target above the start": (flags("--target-rank", "4"), ["target_rank 4", "init_rank 3"]),
    "budget above the start": (flags("--target-budget", "43"), ["target_budget=43", "0..42"]),
    "output_dir in use": (used_output_dir, ["output_dir", "--overwrite"]),
    "output_dir that is a file": (output_dir_is_a_file, ["output_dir", "file"]),
    "no model folder": (flags("--model", "no/such/model/folder"), ["no/such/model/folder"]),
    "pickled weights": (with_model(only_pickled_weights), ["model=", "safetensors"]),
    "no tokenizer": (with_model(no_tokenizer), ["model=", "tokenizer"]),
    "empty model folder": (with_model(lambda f: (f / "config.json").unlink()), ["model="]),
    "fp16 on CPU": (flags("--precision", "fp16"), ["precision=fp16", "bf16"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line(project: Project, tmp_path: Path, mistake: str) -> None:
    change, parts = MISTAKES[mistake]
    arguments = project.arguments(tmp_path / "run", *change(project, tmp_path))
    [(code, errors)] = run_ranks(1, run_recipe, [*arguments, "--max-length", "32"], {})
    assert code == 2, errors
    assert "Traceback" not in errors
    [line] = [line for line in errors.splitlines() if line.startswith("error:")]
    assert all(part in line for part in parts), line
    assert len(line) < 700 and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_fsdp_version_1_is_refused() -> None:
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
    with pytest.raises(UserError, match="FSDP_VERSION=1 .* fsdp_version: 2"):
        build_accelerator(TrainConfig(), environment)


def test_settings_that_contradict_deepspeeds(project: Project, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    settings = json.loads((ROOT / "ds_configs" / "zero2.json").read_text()) | {"gradient_clipping": 0.5}
    (tmp_path / "zero2.json").write_text(json.dumps(settings))
    environment = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "zero2.json")}
    [(code, errors)] = run_ranks(1, run_recipe, project.arguments(tmp_path / "run"), environment)
    [line] = [line for line in errors.splitlines() if line.startswith("error:")]
    assert code == 2 and "gradient_clipping=0.5" in line and "1.0" in line


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [(["--help"], 0, "--target-rank"), (["--target-rnk", "4"], 2, "did you mean --target-rank")],
)
def test_help_and_misspelt_keys_do_not_import_torch(arguments: list[str], code: int, says: str) -> None:
    process = run_command(sys.executable, "-X", "importtime", RECIPE, *arguments)
    assert process.returncode == code and says in process.stdout + process.stderr
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines() if "import time:" in line}
    assert "pydantic" in imported
    assert not {"torch", "transformers", "accelerate", "datasets", "numpy"} & imported


# ----------------------------------------------------------------------------------------------------- run folder


def test_overwrite_replaces_a_run_and_nothing_else_does(tmp_path: Path) -> None:
    def config(overwrite: bool = False) -> CommonsenseConfig:
        return CommonsenseConfig(train=TrainConfig(output_dir=str(tmp_path / "run"), overwrite=overwrite))

    RunFolder(config(), False, {}).log({"step": 0})
    assert not (tmp_path / "run").exists()  # not the main process
    RunFolder(config(), True, {}).log({"step": 0})
    (tmp_path / "run" / "merged").mkdir()
    with pytest.raises(UserError, match="already holds a run"):
        RunFolder(config(), True, {})
    assert (tmp_path / "run" / "merged").exists()
    RunFolder(config(overwrite=True), True, {}).log({"step": 1})
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "run.json", "metrics.jsonl"}
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n'
