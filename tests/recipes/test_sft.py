"""Own texts, end to end: the recipe on tiny models and small files, on one process and on two."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adalora_dist.tasks.evaluation.loss import validation_loss
from adalora_dist.tasks.losses import causal_loss
from adalora_dist.tasks.rows.tokens import IGNORED
from adalora_dist.tasks.sft.demo import demo_conversations
from tests.support.chat_templates import STYLES
from tests.support.ranks import import_deepspeed, import_package
from tests.support.recipe_runs import ENGINES, losses_of, read_json, run_recipe
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama

import_deepspeed()
import_package()

STEPS = 12
FLAGS = [
    *("--max-steps", str(STEPS), "--batch-size", "6", "--micro-batch-size", "3", "--learning-rate", "2e-2"),
    *("--init-rank", "3", "--target-rank", "2", "--max-new-tokens", "6", "--eval-batch-size", "2"),
    *("--max-length", "256", "--log-every", "6", "--eval-share", "0.2", "--show-samples", "2"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte model with a ChatML template, one without a template, and conversations."""
    folder = tmp_path_factory.mktemp("sft")
    for name, style in (("model", STYLES["chatml"]), ("base", None)):
        tokenizer = byte_tokenizer(bos=False)
        if style:
            tokenizer.add_special_tokens({"additional_special_tokens": list(style.specials)})
            tokenizer.chat_template = style.plain
        tokenizer.save_pretrained(folder / name)
        tiny_llama(len(tokenizer)).save_pretrained(folder / name)
    rows = demo_conversations("train")[:30]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADALORA_DIST_CACHE", str(tmp_path / "cache"))


def arguments(project: Path, output: Path, *more: str, model: str = "model", data: str = "") -> list[str]:
    where = ["--model", str(project / model), "--data", data or str(project / "data.jsonl")]
    return [*where, "--output-dir", str(output), *FLAGS, *more]


@pytest.fixture(scope="module")
def single(project: Path) -> Path:
    folder = project / "single"
    code, output, errors = run_recipe("llama_sft", 1, arguments(project, folder))
    assert code == 0, errors
    for said in (
        "data.jsonl: messages; 30 rows",
        "Chat template: the tokenizer's own; replies are found by comparing renderings",
        "24 training rows, 6 validation rows",
        "Sample 2",
        "exact_replies",
    ):
        assert said in output, output
    return folder


def test_recipe_learns_and_exports(project: Path, single: Path) -> None:
    losses, results = losses_of(single), read_json(single, "results.json")
    assert len(losses) == STEPS and sum(losses[-3:]) < sum(losses[:3]) - 1
    assert results["after"]["loss"] < results["before"]["loss"] - 0.5
    assert results["after"]["perplexity"] == pytest.approx(math.exp(results["after"]["loss"]))
    samples = read_json(single, "samples.json")
    assert len(samples) == 2 and all(set(s) == {"prompt", "in the data", "before", "after"} for s in samples)
    assert all(s["prompt"].endswith("<|im_start|>assistant\n") for s in samples)
    assert sum(read_json(single, "rank_pattern.json").values()) == 28
    tokenizer = AutoTokenizer.from_pretrained(single / "merged")
    assert tokenizer.chat_template == STYLES["chatml"].plain
    assert read_json(single, "run.json")["engine"] == "single"
    assert "precision: fp32" in (single / "config.yaml").read_text() or torch.cuda.is_available()


@pytest.mark.parametrize("engine", [pytest.param(e, marks=[pytest.mark.slow] * (e != "zero3")) for e in ENGINES])
def test_two_processes_do_what_one_does(project: Path, single: Path, engine: str) -> None:
    folder = project / engine
    code, _, errors = run_recipe("llama_sft", 2, arguments(project, folder), ENGINES[engine])
    assert code == 0, errors
    assert losses_of(folder) == pytest.approx(losses_of(single), abs=1e-4)
    assert read_json(folder, "rank_pattern.json") == read_json(single, "rank_pattern.json")
    one, two = (read_json(where, "results.json") for where in (single, folder))
    assert two["before"] == pytest.approx(one["before"], rel=1e-6)
    assert two["after"] == pytest.approx(one["after"], rel=1e-3)
    assert [s["before"] for s in read_json(folder, "samples.json")] == [
        s["before"] for s in read_json(single, "samples.json")
    ]


@pytest.mark.parametrize("engine", [None, "fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_evaluation_while_training_changes_nothing(project: Path, single: Path, tmp_path: Path, engine: str) -> None:
    words = ["--eval-every", "5", "--show-samples", "0", "--no-evaluate-before", "--export-formats", "none"]
    environment, num_processes = (ENGINES[engine], 2) if engine else ({}, 1)
    code, output, errors = run_recipe("llama_sft", num_processes, arguments(project, tmp_path, *words), environment)
    assert code == 0, errors
    assert losses_of(tmp_path) == pytest.approx(losses_of(single), abs=1e-4 if engine else 0)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "eval_loss" in record] == [4, 9]
    assert "eval_loss" in output and records[9]["eval_loss"] < records[4]["eval_loss"]
    assert read_json(tmp_path, "results.json")["after"]["loss"] < records[9]["eval_loss"] + 0.5


def test_a_run_that_was_interrupted_has_the_evaluation_before(project: Path, single: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, _, errors = run_recipe("llama_sft", 1, arguments(project, folder, "--checkpoint-every", "6"))
    assert code == 0, errors
    (folder / "results.json").unlink()
    code, output, errors = run_recipe(
        "llama_sft", 1, arguments(project, folder, "--checkpoint-every", "6", "--resume", "auto")
    )
    assert code == 0 and "Continuing after step 12" in output, errors
    assert read_json(folder, "results.json") == read_json(single, "results.json")


OWN: dict[str, tuple[str, Any, list[str], str]] = {
    "instructions": (
        "a.json",
        [{"instruction": f"Add {n}.", "input": "", "output": f"{n + 1}"} for n in range(9)],
        [],
        "",
    ),
    "conversations": (
        "a.json",
        [{"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": "Yes"}]} for n in range(9)],
        [],
        "Chat template: the tokenizer has none, so a plain one is taken and saved with the model",
    ),
    "prompts": (
        "a.json",
        [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(9)],
        ["--train-on", "all"],
        "",
    ),
    "texts": ("a.json", [{"text": f"This is text {n}."} for n in range(9)], [], "7 training rows, 2 validation rows"),
    "questions": (
        "a.json",
        [{"question": f"{n}?", "answer": "Yes"} for n in range(9)],
        ["--columns", "instruction=question,output=answer", "--method", "lora", "--init-rank", "2"],
        "instruction, input, output (instruction=question, output=answer)",
    ),
}


@pytest.mark.parametrize(("file", "rows", "flags", "said"), OWN.values(), ids=OWN)
def test_every_form_trains(project: Path, tmp_path: Path, file: str, rows: Any, flags: list[str], said: str) -> None:
    (tmp_path / file).write_text(json.dumps(rows))
    words = ["--model", str(project / "base"), "--data", str(tmp_path / file), "--output-dir", str(tmp_path / "run")]
    words += ["--max-steps", "3", "--batch-size", "4", "--micro-batch-size", "4", "--eval-share", "0.2"]
    words += ["--max-length", "64", "--max-new-tokens", "4", "--export-formats", "none", *flags]
    code, output, errors = run_recipe("llama_sft", 1, words)
    assert code == 0, errors
    assert said in output and len(losses_of(tmp_path / "run")) == 3
    assert set(read_json(tmp_path / "run", "results.json")["after"]) >= {"loss", "perplexity"}


def test_no_rows_held_out_and_no_samples(project: Path, tmp_path: Path) -> None:
    words = ["--max-steps", "2", "--eval-share", "0", "--export-formats", "none"]
    code, output, errors = run_recipe("llama_sft", 1, arguments(project, tmp_path / "run", *words))
    assert code == 0, errors
    assert "30 training rows, 0 validation rows" in output
    assert read_json(tmp_path / "run", "results.json") == {"before": {}, "after": {}}


def test_dry_run_shows_rows_and_the_plan(project: Path, tmp_path: Path) -> None:
    code, output, errors = run_recipe("llama_sft", 1, arguments(project, tmp_path / "run", "--dry-run"))
    assert code == 0, errors
    assert output.count("<|im_end|>]]") >= 3 and "12: max_steps of 24 rows in batches of 6" in output
    assert not (tmp_path / "run").exists()


def test_validation_loss_is_the_mean_over_targets() -> None:
    model, generator = tiny_llama(40), torch.Generator().manual_seed(1)
    rows = []
    for length in (5, 9, 3, 7, 4):
        tokens = torch.randint(3, 40, (length,), generator=generator).tolist()
        rows.append({"input_ids": tokens, "labels": [IGNORED, *tokens[1:]]})
    total = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].detach()
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(row["input_ids"][1:]), reduction="sum"))
    lengths, loss = [len(row["input_ids"]) for row in rows], causal_loss(rows, 0, torch.device("cpu"))
    targets = [length - 1 for length in lengths]
    for batch_size in (1, 2, 8):
        found = validation_loss(model, loss, lengths, targets, batch_size)
        assert found["loss"] == pytest.approx(total / sum(targets), rel=1e-5)
    assert validation_loss(model, loss, [], [], 2) == {}
    parts: list[list[float]] = []
    for rank in (0, 1, 2):
        validation_loss(model, loss, lengths, targets, 2, rank, 3, lambda own: parts.append(own) or own)
    assert math.fsum(sum(parts, [])) / sum(targets) == pytest.approx(total / sum(targets), rel=1e-5)


@pytest.mark.download
def test_demonstration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADALORA_DIST_CACHE")
    code, output, errors = run_recipe("llama_sft", 1, ["--output-dir", str(tmp_path / "run")])
    assert code == 0, errors
    results = read_json(tmp_path / "run", "results.json")
    assert results["after"]["loss"] < results["before"]["loss"] / 10
    assert results["before"]["exact_replies"] <= 0.25 and results["after"]["exact_replies"] >= 0.75
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged") is not None
