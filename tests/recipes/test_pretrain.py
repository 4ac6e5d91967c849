"""Pre-training, end to end: every method from random weights, on one process and on two, stopped and gone on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from tests.support.paths import ROOT
from tests.support.ranks import import_deepspeed, import_package
from tests.support.recipe_runs import ENGINES, losses_of, read_json, run_recipe
from tests.support.tiny_language_model import byte_tokenizer

import_deepspeed()
import_package()

STEPS = 12
FLAGS = [
    *("--max-steps", str(STEPS), "--batch-size", "6", "--micro-batch-size", "3", "--max-length", "32"),
    *("--max-eval-tokens", "640", "--eval-batch-size", "8", "--log-every", "6", "--checkpoint-every", "6"),
]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADALORA_DIST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


METHODS = ["galore", *(pytest.param(m, marks=pytest.mark.slow) for m in ("relora", "low_rank", "full", "lora"))]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_goes_on_with_the_same_text_elsewhere(method: str, tmp_path: Path) -> None:
    words = ["--method", method, *FLAGS]
    code, output, errors = run_recipe("llama_pretrain", 1, [*words, "--output-dir", str(tmp_path / "one")])
    assert code == 0, errors
    assert "541,536 trainable" in output or method not in ("galore", "full")
    results, losses = read_json(tmp_path / "one", "results.json"), losses_of(tmp_path / "one")
    assert results["after"]["perplexity"] < 0.6 * results["before"]["perplexity"] and len(losses) == STEPS
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "merged")
    assert sum(p.numel() for p in merged.parameters()) == 541_536
    assert read_json(tmp_path / "one", "verification.json")["largest_logit_difference"] < 1e-3

    # From the checkpoint in the middle, on two processes: the rows and so the losses are those of the one.
    middle = tmp_path / "one" / "checkpoints" / "step-00000006"
    again = [*words, "--no-overwrite", "--resume", str(middle), "--output-dir", str(tmp_path / "two")]
    code, _, errors = run_recipe("llama_pretrain", 2, again, ENGINES["fsdp2"])
    assert code == 0, errors
    assert losses_of(tmp_path / "two") == pytest.approx(losses, rel=1e-4)


def bert(folder: Path, **settings: Any) -> list[str]:
    """Flags of a run with a BERT as language model, whose head shares its weight and its bias, on a short text."""
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(vocab_size=len(tokenizer), hidden_dropout_prob=0.0, **sizes, **settings))
    model.save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    lines = [f"On day {day} it rained on the hills of the north." for day in range(300)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    return ["--method", "lora", *FLAGS, "--model", str(folder / "bert"), "--data", str(folder / "text.txt")]


def test_a_model_that_reads_both_ways_is_refused(tmp_path: Path) -> None:
    """Its loss would fall to nothing. As in every recipe of causal models."""
    words = [*bert(tmp_path), "--output-dir", str(tmp_path / "run")]
    code, _, errors = run_recipe("llama_pretrain", 2, words, ENGINES["fsdp2"])
    assert code == 2 and "BertLMHeadModel reads a text both ways" in errors.splitlines()[-1]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_the_same_model_as_a_decoder(tmp_path: Path) -> None:
    words, losses = bert(tmp_path, is_decoder=True, attention_probs_dropout_prob=0.0), []
    for number in (1, 2):
        folder = tmp_path / str(number)
        code, _, errors = run_recipe(
            "llama_pretrain", number, [*words, "--output-dir", str(folder)], ENGINES["fsdp2"] if number == 2 else None
        )
        assert code == 0, errors
        losses.append(losses_of(folder))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
@pytest.mark.parametrize("method", ["galore", "relora", "low_rank", "full"])
def test_two_processes_do_what_one_does(method: str, engine: str, tmp_path: Path) -> None:
    losses = []
    for number, environment in ((1, None), (2, ENGINES[engine])):
        words = ["--method", method, *FLAGS, "--output-dir", str(tmp_path / str(number))]
        code, _, errors = run_recipe("llama_pretrain", number, words, environment)
        assert code == 0, errors
        losses.append(losses_of(tmp_path / str(number)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


COUNTS = {"60m": 58_073_600, "130m": 134_105_856, "350m": 367_969_280, "1b": 1_339_082_752}


@pytest.mark.parametrize("size", [pytest.param(s, marks=[pytest.mark.slow] * (s != "60m")) for s in COUNTS])
def test_published_sizes_can_be_planned_without_a_network(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = ROOT / "recipes" / "configs" / f"llama_pretrain_{size}.yaml"
    method = "relora" if size == "60m" else "galore"
    code, output, errors = run_recipe("llama_pretrain", 1, ["--config", str(file), "--dry-run", "--method", method])
    assert code == 0, errors
    assert f"{COUNTS[size]:,} parameters" in output and "in batches of 512" in output
