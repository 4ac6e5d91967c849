"""Evaluations while training: the best model, early stopping, and both with an interruption, on one process and two."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adalora_dist.artifacts.checkpoints.content import stored_adapters
from adalora_dist.artifacts.checkpoints.writer import checkpoint_at
from adalora_dist.artifacts.export import read_adapter
from adalora_dist.config.sections import EvaluationConfig
from adalora_dist.training.evaluations import Evaluations
from tests.support.ranks import import_deepspeed, import_package
from tests.support.recipe_runs import ENGINES, losses_of, read_json, run_recipe
from tests.support.refusals import refused
from tests.support.tiny_project import write_data, write_model

import_deepspeed()
import_package()

STEPS, FREEZE = 20, 8
FLAGS = [
    *("--max-steps", str(STEPS), "--batch-size", "8", "--micro-batch-size", "4", "--learning-rate", "5e-2"),
    *("--lr-schedule", "constant", "--max-eval-rows", "6", "--log-every", "6", "--max-length", "64"),
    *("--init-rank", "3", "--target-rank", "2", "--initial-warmup-steps", "2", "--final-steps", str(STEPS - FREEZE)),
    *("--eval-every", "2", "--eval-share", "0.2", "--no-evaluate-before", "--evaluate-by", "likelihood"),
    *("--checkpoint-every", "5", "--keep-checkpoints", "9", "--export-formats", "none"),
]


# ------------------------------------------------------------------------------------------------------------ the rules


def evaluations(scores: Any = (), first: int = 0, best: Any = None, **settings: Any) -> Evaluations:
    """Of a run of 10 steps whose pattern is frozen from step ``first`` on, with the scores of ``loss`` to come."""
    given, state = iter(scores), SimpleNamespace(step=0)
    schedule = SimpleNamespace(freeze_step=first - 1) if first else None
    hooks = SimpleNamespace(
        method_step=SimpleNamespace(schedule=schedule), problem=lambda: "over budget" if state.step < first else None
    )
    resumed = None if best is None else SimpleNamespace(run={"best": best}, path="runs/a/checkpoints/step-00000004")
    prepared: Any = SimpleNamespace(hooks=hooks, model=torch.nn.Identity(), resumed=resumed)
    made = Evaluations(
        prepared, EvaluationConfig(**{"eval_every": 1, **settings}), 10, lambda: {"loss": next(given), "f1": 0.5}
    )
    made.now = state  # type: ignore[attr-defined]
    return made


def best_steps(made: Any, num_steps: int) -> list[int]:
    """The steps whose model was the best so far, up to the end of the run."""
    found = []
    for step in range(1, num_steps + 1):
        made.now.step = step
        if made.improved(step, made.after(step)):
            found.append(step)
        if made.ended:
            return [*found, -step]
    return found


def test_candidates_begin_with_the_freeze_and_ties_and_nan_are_no_improvement() -> None:
    losses = [0.1, 0.1, 5.0, 4.0, 4.0, float("nan"), 3.0, 3.5, 3.0, 9.0]
    assert best_steps(evaluations(losses, first=3, keep_best="loss"), 10) == [3, 4, 7]
    assert best_steps(evaluations(losses, first=3, keep_best="loss", early_stopping=2), 10) == [3, 4, -6]
    assert best_steps(evaluations([float("nan"), 2.0, 1.0], keep_best="loss"), 3) == [2, 3]
    assert best_steps(evaluations([1.0] * 10, keep_best="f1"), 10) == [1]


def test_a_run_goes_on_from_what_its_checkpoint_says() -> None:
    best = {"metric": "loss", "score": 3.0, "step": 4, "num_since": 1}
    made = evaluations([3.5, 2.0], keep_best="loss", early_stopping=2, best=best)
    assert not made.improved(5, made.after(5)) and made.ended and made.record == best | {"num_since": 2}
    with refused("keep_best=f1, but up to .*step-00000004 the best model was chosen by loss"):
        evaluations(keep_best="f1", best=best)


def test_what_could_not_act_is_refused() -> None:
    with refused("early_stopping=3 with eval_every=2: 2 evaluations fall into steps 8 to 10 .before step 8 the model"):
        evaluations(first=8, keep_best="loss", early_stopping=3, eval_every=2)
    with refused("early_stopping=9 with eval_every=2: 5 evaluations fall into steps 1 to 10, too few .* raise max_st"):
        evaluations(keep_best="loss", early_stopping=9, eval_every=2)
    with refused("keep_best=acuracy: evaluations have no such score; legal: loss, f1"):
        evaluations([1.0], keep_best="acuracy").check_name()
    with refused("eval_every=1: there are no rows"):
        Evaluations(SimpleNamespace(resumed=None), EvaluationConfig(eval_every=1), 10, None)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluations")
    write_data(folder / "data")
    write_model(folder / "model", folder / "data")
    return folder


def run(project: Path, output: Path, *more: str, engine: str | None = None) -> str:
    where = ["--model", str(project / "model"), "--data", str(project / "data"), "--output-dir", str(output)]
    environment, num_processes = (ENGINES[engine], 2) if engine else ({}, 1)
    code, said, errors = run_recipe("llama_commonsense", num_processes, [*where, *FLAGS, *more], environment)
    assert code == 0, errors
    return str(said)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_updates(some: Any, others: Any) -> bool:
    return all(
        one.name == other.name and torch.equal(one.P, other.P) and torch.equal(one.lam, other.lam)
        for one, other in zip(some, others, strict=True)
    )


def same_models(one: Path, other: Path) -> bool:
    return same_updates(*(read_adapter(folder / "adapter").adapters for folder in (one, other)))


@pytest.fixture(scope="module")
def whole(project: Path) -> Path:
    said = run(project, project / "whole", "--keep-best", "loss")
    assert "24 training rows; evaluation: boolq 6, openbookqa 6; while training: 6" in said, said
    assert "it is the one exported" in said, said
    return project / "whole"


def test_the_best_model_is_the_one_that_is_left(whole: Path) -> None:
    found = {r["step"] + 1: r["eval_loss"] for r in records(whole) if "eval_loss" in r}
    assert list(found) == [*range(2, STEPS, 2), STEPS] and {"eval_accuracy", "eval_perplexity"} <= set(
        records(whole)[1]
    )
    best = read_json(whole, "best.json")
    candidates = {step: loss for step, loss in found.items() if step > FREEZE}
    assert best["step"] == min(candidates, key=candidates.__getitem__) and best["score"] == candidates[best["step"]]
    assert best["step"] < STEPS, "the learning rate is to be so high that the last model is not the best"
    assert sum(read_json(whole, "rank_pattern.json").values()) == 28
    checkpoint = checkpoint_at(whole / "best" / f"step-{best['step']:08d}")
    exported, kept = read_adapter(whole / "adapter").adapters, stored_adapters(checkpoint)[0]
    assert len(exported) == 14 and same_updates(exported, kept)


def test_an_interruption_changes_neither_the_choice_nor_the_model(project: Path, whole: Path, tmp_path: Path) -> None:
    """Continued in another folder, from a checkpoint whose best model lies in the first one, and in place."""
    best = read_json(whole, "best.json")
    for step in (10, 15):
        folder, source = tmp_path / f"from{step}", whole / "checkpoints" / f"step-{step:08d}"
        in_thread = "on" if step == 15 else "auto"  # the best model is there before a checkpoint names it
        run(project, folder, "--keep-best", "loss", "--resume", str(source), "--async-checkpoints", in_thread)
        assert read_json(folder, "best.json") == best and losses_of(folder) == losses_of(whole)
        assert same_models(folder, whole)
    (folder / "best.json").unlink()
    run(project, folder, "--keep-best", "loss", "--resume", "auto")
    assert read_json(folder, "best.json") == best and same_models(folder, whole)


def test_early_stopping_under_fsdp2_with_a_resume_in_between(project: Path, tmp_path: Path) -> None:
    words = ("--keep-best", "accuracy", "--early-stopping", "1")  # of few questions: it seldom grows twice
    first = run(project, tmp_path / "a", *words, engine="fsdp2")
    best = read_json(tmp_path / "a", "best.json")
    assert "Stopped early after step" in first and best["num_since"] == 1 and best["num_steps"] < STEPS
    assert len(losses_of(tmp_path / "a")) == best["num_steps"] == best["step"] + 2
    source = tmp_path / "a" / "checkpoints" / "step-00000010"
    run(project, tmp_path / "b", *words, "--resume", str(source), engine="fsdp2")
    again = run(project, tmp_path / "a", *words, "--resume", "auto", engine="fsdp2")  # it has ended: nothing is left
    assert f"Continuing after step {best['num_steps']}" in again and "Stopped early" in again
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert read_json(folder, "best.json") == best
        assert read_json(folder, "results.json")["after"]
    assert same_models(tmp_path / "a", tmp_path / "b")
