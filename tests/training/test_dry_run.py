"""The dry run: of every shipped file and preset, without a network, and equal to what the run then does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from adalora_dist.config.flags import parse_config
from adalora_dist.config.presets import PresetTable
from adalora_dist.config.sections import RunConfig
from adalora_dist.tasks.demo_models.pretrained import BART_SHAPE, GPT2_SHAPE
from adalora_dist.tasks.rows.public import PUBLIC_ROWS
from adalora_dist.training.dry_run import DryRun, plan_run, plan_text
from tests.support.paths import ROOT
from tests.support.recipe_runs import ENGINES, read_json, run_recipe
from tests.support.refusals import refusal
from tests.support.shipped import CONFIGS, NUMBERS, ROWS, SCHEMAS, flags_of, lacking, schema_of
from tests.support.tiny_text_project import write_summarization

ARCHITECTURES = CONFIGS / "architectures"
AUTO_CLASSES: dict[str, Any] = {
    "llama_commonsense": AutoModelForCausalLM,
    "deberta_glue": AutoModelForSequenceClassification,
    "deberta_squad": AutoModelForQuestionAnswering,
    "summarize_bart": AutoModelForSeq2SeqLM,
    "gpt2_e2e": AutoModelForCausalLM,
    "llama_sft": AutoModelForCausalLM,
}
FULL_SIZE = [  # (those of llama_pretrain make their models: tests/recipes/test_pretrain.py)
    path
    for path in sorted(CONFIGS.glob("*.yaml"))
    if not path.stem.endswith("_demo") and "70b" not in path.stem and "pretrain" not in path.stem
]


def plan(path: Path, flags: list[str], num_rows: int = 100_000, table: bool = False) -> tuple[DryRun, RunConfig]:
    [recipe] = [recipe for recipe in SCHEMAS if path.stem.startswith(recipe)]
    run: Any = parse_config(schema_of(path), flags, table=path if table else None)
    if hasattr(run.data, "task"):
        num_rows = PUBLIC_ROWS[run.data.task]
    return plan_run(run, AUTO_CLASSES[recipe], num_rows, ARCHITECTURES, "none"), run


def rows_of(recipe: str, **choice: str) -> list[dict[str, str]]:
    return [row for path, row in ROWS if path.stem == recipe and choice.items() <= row.items()]


def of_row(recipe: str, row: dict[str, str]) -> DryRun:
    run, _ = plan(CONFIGS / "tables" / f"{recipe}.yaml", flags_of(row), table=True)
    return run


# ---------------------------------------------------------------------------------------------------- the paper's sizes


@pytest.mark.parametrize(("recipe", "task"), [("deberta_glue", "cola"), ("deberta_squad", "v1.1")])
def test_budgets_of_deberta_are_the_papers(recipe: str, task: str) -> None:
    """0.3M, 0.6M, 1.2M and 0.08 to 0.65 %: names of budgets in triplets, over 72 matrices, without the head.

    Published counts (table 1): LoRA 0.33M at rank 2 and 1.33M at rank 8, AdaLoRA 0.32M and 1.27M where its ranks ended.
    The names are round: what is counted here is 10 to 13 % more, for LoRA as for AdaLoRA.
    """
    spec = json.loads(NUMBERS.read_text(encoding="utf-8"))
    ranks = spec["glue"]["ranks"] if recipe == "deberta_glue" else spec["qa_and_summarization"]["ranks"]
    budgets = {row["budget"] for row in rows_of(recipe, task=task) if "budget" in row}
    assert budgets == set(ranks) and len(budgets) >= 3
    for budget, published in ranks.items():
        row = {"preset": "paper", "task": task, "budget": budget}
        adalora, lora = (of_row(recipe, {**row, "method": method}) for method in ("adalora", "lora"))
        assert adalora.num_matrices == lora.num_matrices == 72
        assert adalora.schedule is not None and lora.schedule is None
        assert adalora.allocations[-1][1] == adalora.schedule.target_budget == published["budget"]
        assert adalora.schedule.initial_budget == 72 * published["initial"]
        assert lora.num_adapter_parameters == 165_888 * published["lora_r"]
        assert adalora.num_final == lora.num_adapter_parameters + published["budget"]
        named = float(budget[:-1]) * (1e6 if budget.endswith("M") else lora.num_parameters / 100)
        assert 1.08 < lora.num_adapter_parameters / named < 1.14
        assert 0.183e9 < adalora.num_parameters < 0.185e9
        if published["lora_r"] in (2, 8):
            assert f"{lora.num_adapter_parameters / 1e6:.2f}" == {2: "0.33", 8: "1.33"}[published["lora_r"]]
            fewest, most = adalora.final_range(published["initial"])
            assert fewest < {2: 0.32e6, 8: 1.27e6}[published["lora_r"]] < most


@pytest.mark.parametrize("row", rows_of("summarize_bart"), ids=lambda row: "-".join(row.values()))
def test_rows_of_bart_have_the_published_numbers(row: dict[str, str]) -> None:
    spec = json.loads(NUMBERS.read_text(encoding="utf-8"))
    name = {"xsum": "XSum", "cnn_dailymail": "CNN/DailyMail"}[row["task"]]
    numbers = dict(spec["summarization"][name])
    if row["preset"] == "code":
        numbers |= {k: v for k, v in spec["summarization"]["code_differs"][name].items() if k != "ranks"}
    run, config = plan(CONFIGS / "tables" / "summarize_bart.yaml", flags_of(row), table=True)
    settings: Any = config
    found = {
        "lr": settings.train.learning_rate, "batch": settings.train.batch_size, "epochs": settings.train.epochs,
        "max_source": settings.data.max_source_length, "max_target": settings.data.max_target_length,
        "beams": settings.evaluation.num_beams, "warmup_steps": settings.train.lr_warmup_steps,
    }  # fmt: skip
    if row["method"] != "full":
        found |= {"alpha": settings.adapter.alpha}
    if row["method"] == "adalora":
        found |= {
            "gamma": settings.adapter.orthogonality, "t_i": settings.adapter.initial_warmup_steps,
            "dT": settings.adapter.mask_interval_steps, "t_f": settings.adapter.final_steps,
        }  # fmt: skip
    assert (
        found == {n: v for n, v in numbers.items() if n not in lacking(row["method"])}
        and settings.train.seed == spec["summarization"]["seed"]
    )
    assert run.num_parameters == 406_291_456
    assert run.num_steps == {"xsum": 25 * 3188, "cnn_dailymail": 15 * 8972}[row["task"]]
    if row["method"] == "full":
        assert run.num_other_trained == run.num_parameters and run.num_matrices == 0
        return
    published = spec["qa_and_summarization"]["ranks"][row["budget"]]
    assert run.num_matrices == 192
    if row["method"] == "lora":
        assert settings.adapter.init_rank == published["lora_r"]
        assert run.num_adapter_parameters == 540_672 * published["lora_r"]
    else:
        assert (settings.adapter.init_rank, settings.adapter.target_rank) == (published["initial"], published["final"])
        assert run.allocations[-1][1] == 192 * published["final"] and len(run.allocations) > 100


def test_tables_of_bart_are_complete() -> None:
    assert len(rows_of("summarize_bart")) == 2 * 2 * (2 * 4 + 1)


# ------------------------------------------------------------------------------------------------- every full-size file


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda path: path.stem)
def test_every_full_size_file_can_be_planned_without_a_network(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run, config = plan(path, ["--config", str(path)])
    text = plan_text(run, config)
    assert f"{run.num_parameters:,} parameters" in text and all(len(line) < 180 for line in text.splitlines())
    if config.adapter.trains_backbone:
        assert run.schedule is None and "trained in full: 100 %" in text
        return
    assert run.schedule is not None and 0.0005 < run.num_final / run.num_parameters < 0.05
    assert re.search(r"Budget +[\d,]+ -> [\d,]+ triplets", text)


def test_there_is_an_architecture_for_every_model_that_is_named() -> None:
    names = {parse_config(schema_of(path), ["--config", str(path)]).model.name for path in CONFIGS.glob("*.yaml")}
    for path in (CONFIGS / "tables").glob("*.yaml"):
        names.add(
            PresetTable(path, tuple(schema_of(path).model_fields)).resolve(next(r for p, r in ROWS if p == path))[
                "model"
            ]["name"]
        )
    named = {name.rpartition("/")[2] for name in names if name}
    demos = {"demo-bart", "demo-gpt2", "all-MiniLM-L6-v2", "SmolLM2-135M-Instruct"}
    assert len(FULL_SIZE) >= 5 and {path.stem for path in ARCHITECTURES.glob("*.json")} == named | demos


def test_published_share_of_llama_7b() -> None:
    """The DoRA paper counts 0.83 % for LoRA of rank 32 on the same matrices."""
    path = CONFIGS / "llama_commonsense_llama_7b.yaml"
    run, _ = plan(path, ["--config", str(path)])
    assert f"{run.num_final / run.num_parameters:.2%}" == "0.83%" and run.num_parameters == 6_738_415_616


# ------------------------------------------------------------------------------------------------------- against a run


def test_shapes_of_the_demonstrations_are_shipped_as_they_are() -> None:
    for name, shape in (("demo-bart", BART_SHAPE), ("demo-gpt2", GPT2_SHAPE)):
        shipped = read_json(ARCHITECTURES, f"{name}.json")
        common = shape.keys() & shipped.keys()
        assert len(common) >= 4 and all(shipped[key] == shape[key] for key in common)


def test_plan_is_what_the_run_then_does(tmp_path: Path) -> None:
    model, data = write_summarization(tmp_path)
    flags = ["--model", str(model), "--data", str(data), "--epochs", "2", "--batch-size", "4", "--init-rank", "3"]
    flags += [
        "--target-rank",
        "1.5",
        "--output-dir",
        str(tmp_path / "run"),
        "--max-new-tokens",
        "4",
        "--max-eval-rows",
        "2",
    ]
    flags += ["--export-formats", "none", "--no-evaluate-before"]
    code, _, errors = run_recipe("summarize_bart", 1, [*flags, "--dry-run"])
    assert code == 2 and "set --max-source-length 96, or less" in errors  # refused as the run would be
    flags += ["--max-source-length", "96"]
    code, output, errors = run_recipe("summarize_bart", 1, [*flags, "--dry-run"])
    assert code == 0 and not (tmp_path / "run").exists(), errors
    code, _, errors = run_recipe("summarize_bart", 1, flags)
    assert code == 0, errors
    facts = read_json(tmp_path / "run", "run.json")
    assert f"Steps      {facts['num_steps']}: 2 epochs of 24 rows in batches of 4" in output
    assert f"{facts['num_matrices']} matrices" in output
    assert f"Adapters   {facts['num_trainable_parameters']:,} (" in output
    assert f"Budget     {facts['initial_budget']} -> {facts['target_budget']} triplets" in output


@pytest.mark.slow
def test_a_budget_is_planned_trained_and_continued_elsewhere(tmp_path: Path) -> None:
    model, data = write_summarization(tmp_path)
    flags = ["--model", str(model), "--data", str(data), "--batch-size", "4", "--max-steps", "4", "--budget", "12%"]
    flags += ["--max-source-length", "96", "--max-new-tokens", "4", "--max-eval-rows", "2", "--no-evaluate-before"]
    flags += ["--export-formats", "none", "--method", "lora", "--checkpoint-every", "2", "--keep-checkpoints", "9"]
    code, planned, errors = run_recipe("summarize_bart", 1, [*flags, "--dry-run"])
    assert code == 0, errors
    [within] = [line.split(maxsplit=1)[1] for line in planned.splitlines() if line.startswith("Within")]
    code, output, errors = run_recipe("summarize_bart", 1, [*flags, "--output-dir", str(tmp_path / "first")])
    assert code == 0 and f"Budget: {within}" in output, errors
    facts = read_json(tmp_path / "first", "run.json")
    assert facts["parameter_budget"]["num_trained"] == facts["num_trainable_parameters"]
    assert facts["num_trainable_parameters"] <= facts["parameter_budget"]["limit"]
    [checkpoint] = (tmp_path / "first").glob("checkpoints/step-*2")
    then = ["--resume", str(checkpoint), "--output-dir", str(tmp_path / "then")]
    code, output, errors = run_recipe("summarize_bart", 2, [*flags, *then], ENGINES["fsdp2"])
    assert code == 0 and f"Budget: {within}" in output, errors
    first, second = (
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("first", "then")
    )
    assert second == pytest.approx(first, rel=1e-4) and len(first) == 4
    code, _, errors = run_recipe("summarize_bart", 1, [*flags, *then[:2], "--budget", "11%", "--output-dir", "x"])
    assert code == 2 and "adapter.budget 12% -> 11%" in errors


@pytest.mark.parametrize("recipe", SCHEMAS)
def test_every_recipe_says_what_its_demonstration_would_be(recipe: str) -> None:
    code, output, errors = run_recipe(recipe, 1, ["--dry-run"])
    assert code == 0, errors
    trained = r"Besides +[\d,]+ \(.*\) trained in full" if recipe == "llama_pretrain" else r"Adapters +[\d,]+ \(\d"
    assert output.startswith("Dry run") and re.search(trained, output)
    memory = r"Memory     not planned: .* galore" if recipe == "llama_pretrain" else r"(?m)^peak +[\d.]+ [MG]B"
    assert re.search(memory, output)
    assert (ROOT / "recipes" / f"{recipe}.py").exists()


SIZES = [
    ("num_hidden_layers", 10**9), ("num_hidden_layers", 0), ("hidden_size", 0), ("hidden_size", 10**12),
    ("head_dim", 10**9), ("text_config", {"num_experts": 10**7}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), SIZES)
def test_a_model_that_nobody_could_build_is_refused_before_it_is_built(tmp_path: Path, name: str, value: Any) -> None:
    """Without weights, too, a billion layers take hours and fill the memory."""
    architecture = json.loads((ARCHITECTURES / "Llama-2-7b-hf.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**architecture, name: value}))
    run: Any = parse_config(SCHEMAS["llama_sft"], ["--model", str(tmp_path)])
    message = refusal(plan_run, run, AutoModelForCausalLM, 10, ARCHITECTURES, "none")
    assert "in its config.json is " in message and ", must be " in message
