"""A run that may not be continued is left exactly as it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.support.ranks import import_package
from tests.support.recipe_runs import run_recipe
from tests.support.settings import adapter_flags
from tests.support.tiny_project import write_data, write_model

import_package()


def arguments(project: Path, run: Path, *more: str) -> list[str]:
    return [
        *("--model", str(project / "model"), "--data", str(project / "data"), "--output-dir", str(run)),
        *("--max-steps", "8", "--batch-size", "4", "--micro-batch-size", "4", "--no-evaluate-before"),
        *("--checkpoint-every", "2", "--max-eval-rows", "2", "--keep-checkpoints", "9"),
        *adapter_flags(more, init_rank=3, target_rank=2), *more,
    ]  # fmt: skip


def contents(run: Path) -> dict[str, bytes | str]:
    """Everything in a run folder, links as such, without the lock."""
    return {
        str(path.relative_to(run)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(run.rglob("*"))
        if not path.is_dir() and not path.name.startswith(".lock")
    }


def other_rows(project: Path) -> None:
    path = project / "data" / "boolq" / "train.jsonl"
    path.write_text(path.read_text().replace("dog", "cat"))


def other_weights(project: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(project / "model")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(project / "model")


def test_a_refused_resume_changes_nothing(tmp_path: Path) -> None:
    """Neither checkpoints nor logs nor exports, whatever the reason: settings, rows, weights."""
    write_data(tmp_path / "data")
    write_model(tmp_path / "model", tmp_path / "data")
    run = tmp_path / "run"
    code, _, errors = run_recipe("llama_commonsense", 1, arguments(tmp_path, run))
    assert code == 0, errors
    before = contents(run)
    names = {f"checkpoints/step-0000000{step}/state.json" for step in (0, 2, 4, 6, 8)}
    assert names | {"merged/model.safetensors", "metrics.jsonl"} <= before.keys()
    reasons = {
        "other settings": (lambda project: None, "--learning-rate", "0.5"),
        "training rows": (other_rows,),
        "not the backbone": (other_weights,),
    }
    for number, (says, (change, *more)) in enumerate(reasons.items()):
        project = tmp_path / f"project-{number}"
        for name in ("data", "model"):
            shutil.copytree(tmp_path / name, project / name)
        change(project)
        resume = str(run / "checkpoints" / "step-00000004")
        code, _, errors = run_recipe("llama_commonsense", 1, arguments(project, run, "--resume", resume, *more))
        assert code == 2 and says in errors, errors
        assert contents(run) == before, says


def test_folders_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    write_model(tmp_path / "model", tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    code, _, errors = run_recipe("llama_commonsense", 1, arguments(tmp_path, tmp_path / "run"))
    assert code == 2 and "is a link" in errors, errors
    assert not any((tmp_path / "elsewhere").iterdir())
