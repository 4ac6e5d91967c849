"""Facts to sentences: rows and references, the metrics, and the GPT-2 recipe on one process and on two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.e2e.config import E2EDataConfig
from adalora_dist.tasks.e2e.demo import demo_places
from adalora_dist.tasks.e2e.metrics import METRICS, data_to_text_scores, missing_metrics
from adalora_dist.tasks.e2e.rows import by_meaning, encode_rows, load_e2e, prompt_tokens
from adalora_dist.tasks.rows.tokens import IGNORED
from tests.support.paths import shared
from tests.support.ranks import import_deepspeed, import_package
from tests.support.recipe_runs import ENGINES, losses_of, read_json, run_recipe
from tests.support.tiny_text_project import NUM_TEST, NUM_TRAIN, write_e2e, write_jsonl

import_deepspeed()
import_package()

pytestmark = pytest.mark.usefixtures("cache")

STEPS = 12
FLAGS = [
    *("--max-steps", str(STEPS), "--batch-size", "6", "--micro-batch-size", "3", "--learning-rate", "2e-2"),
    *("--init-rank", "3", "--target-rank", "2", "--num-beams", "2", "--max-new-tokens", "12", "--eval-batch-size", "2"),
    *("--max-length", "96", "--log-every", "6"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e")
    write_e2e(folder)
    return folder


def arguments(project: Path, output: Path, *more: str) -> list[str]:
    where = ["--model", str(project / "model"), "--data", str(project / "data"), "--output-dir", str(output)]
    return [*where, *FLAGS, *more]


# ----------------------------------------------------------------------------------------------------------- the data


def test_references_of_one_meaning_are_kept_together(tmp_path: Path) -> None:
    rows = [("a[1]", "one"), ("b[2]", "two"), ("a[1]", "uno"), ("c[3]", "three")]
    write_jsonl(tmp_path / "train.jsonl", ({"mr": mr, "ref": ref} for mr, ref in rows))
    write_jsonl(tmp_path / "dev.jsonl", ({"meaning_representation": mr, "human_reference": ref} for mr, ref in rows))
    data = E2EDataConfig(source=str(tmp_path), max_train_rows=2, max_eval_rows=2)
    assert load_e2e(data, "train") == rows[:2]
    assert by_meaning(load_e2e(data, "test")) == {"a[1]": ["one", "uno"], "b[2]": ["two"]}


@pytest.mark.parametrize("row", [{"mr": "a[1]"}, {"mr": "a[1]", "ref": " "}, {"mr": 3, "ref": "x"}, ["a"]])
def test_bad_rows_are_named(tmp_path: Path, row: object) -> None:
    (tmp_path / "train.jsonl").write_text('{"mr": "a[1]", "ref": "x"}\n' + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"train.jsonl:2: "):
        load_e2e(E2EDataConfig(source=str(tmp_path)), "train")


def test_loss_counts_on_the_text_alone(project: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(project / "model")
    rows = load_e2e(E2EDataConfig(source=str(project / "data")), "train")
    encoded = encode_rows(rows, tokenizer, 96)
    assert len(encoded) == NUM_TRAIN
    for (mr, ref), row in zip(rows, encoded, strict=True):
        [prompt] = prompt_tokens([mr], tokenizer)
        text = [label for label in row["labels"] if label != IGNORED]
        assert row["input_ids"] == [*prompt, *text] and text[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(text[:-1]).replace(" ", "") == ref.replace(" ", "")
    with pytest.raises(UserError, match="max_length=16 .* --max-length"):
        encode_rows(rows, tokenizer, 16)


def test_test_lists_name_towns_that_training_lists_do_not() -> None:
    train, test = ({mr.rpartition("town[")[2] for mr, _ in demo_places(split)} for split in ("train", "test"))
    assert len(test) >= 5 and not train & test


# -------------------------------------------------------------------------------------------------------- the metrics

REFERENCES = [
    ["The Mill is a cheap pub .", "Cheap food at the Mill pub ."],
    ["The Swan is near the river and is good ."],
]


def test_perfect_texts_score_as_high_as_a_metric_goes() -> None:
    perfect = data_to_text_scores([references[-1] for references in REFERENCES], REFERENCES)
    assert perfect["bleu"] == pytest.approx(100) and perfect["rougeL"] == pytest.approx(100)
    other = data_to_text_scores(["The Mill is a pub .", "The Swan is good ."], REFERENCES)
    nothing = data_to_text_scores(["", "zebra zebra"], REFERENCES)
    for metric in perfect:
        assert nothing[metric] < other[metric] < perfect[metric], metric
    assert set(perfect) | set(missing_metrics()) == set(METRICS) and {"bleu", "nist", "rougeL"} <= set(perfect)


def test_order_of_references_and_rows_does_not_matter() -> None:
    texts = ["The Mill is a pub .", "The Swan is good ."]
    turned = [list(reversed(references)) for references in reversed(REFERENCES)]
    assert data_to_text_scores(texts[::-1], turned) == pytest.approx(data_to_text_scores(texts, REFERENCES))


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "java" in missing_metrics()["meteor"].lower()


# --------------------------------------------------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def single(project: Path) -> Path:
    folder = project / "single"
    code, output, errors = run_recipe("gpt2_e2e", 1, arguments(project, folder))
    assert code == 0, errors
    assert f"{NUM_TRAIN} training rows; evaluation: {NUM_TEST} lists of facts with {2 * NUM_TEST} references" in output
    return folder


def test_recipe_learns_meets_its_budget_and_exports(project: Path, single: Path) -> None:
    losses, pattern = losses_of(single), read_json(single, "rank_pattern.json")
    assert len(losses) == STEPS and sum(losses[-3:]) < sum(losses[:3]) - 1
    assert len(pattern) == 8 and sum(pattern.values()) == 16  # c_attn, c_proj, c_fc, c_proj of two layers: Conv1D
    assert len(read_json(single, "texts.json")) == NUM_TEST
    merged = AutoModelForCausalLM.from_pretrained(single / "merged")
    plain = AutoModelForCausalLM.from_pretrained(project / "model")
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        assert (merged(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("engine", [pytest.param(e, marks=[pytest.mark.slow] * (e != "zero3")) for e in ENGINES])
def test_two_processes_do_what_one_does(project: Path, single: Path, engine: str) -> None:
    folder = project / engine
    code, _, errors = run_recipe("gpt2_e2e", 2, arguments(project, folder), ENGINES[engine])
    assert code == 0, errors
    assert (read_json(folder, "run.json")["engine"], read_json(folder, "run.json")["num_processes"]) == (engine, 2)
    assert losses_of(folder) == pytest.approx(losses_of(single), abs=1e-4)
    assert read_json(folder, "rank_pattern.json") == read_json(single, "rank_pattern.json")
    assert read_json(folder, "results.json")["before"] == read_json(single, "results.json")["before"]
    assert read_json(folder, "texts.json") == read_json(single, "texts.json")


@pytest.mark.slow
def test_real_data(project: Path, tmp_path: Path) -> None:
    """Real rows with a tiny model: multi-reference grouping, metrics, generation; not a statement about scores."""
    data = str(shared("data/e2e"))
    words = ["--model", str(project / "model"), "--data", data, "--output-dir", str(tmp_path / "run"), *FLAGS]
    words += ["--max-train-rows", "200", "--max-eval-rows", "10", "--max-length", "128"]
    code, output, errors = run_recipe("gpt2_e2e", 2, words, ENGINES["zero3"])
    assert code == 0, errors
    assert "200 training rows; evaluation: 10 lists of facts" in output
    assert sum(losses_of(tmp_path / "run")[-3:]) < sum(losses_of(tmp_path / "run")[:3])
