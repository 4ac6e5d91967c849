"""Every recipe on a file of one's own, evaluated while it trains, its best model kept; packing; answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from adalora_dist.tasks.sft.demo import demo_conversations
from tests.support.chat_templates import STYLES
from tests.support.ranks import import_deepspeed, import_package
from tests.support.recipe_runs import ENGINES, losses_of, read_json, run_recipe
from tests.support.tiny_encoders import write_encoder, write_glue, write_squad
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama
from tests.support.tiny_project import write_data, write_model
from tests.support.tiny_text_project import write_e2e, write_summarization

import_deepspeed()
import_package()

pytestmark = pytest.mark.slow

FLAGS = [
    *("--max-steps", "10", "--batch-size", "6", "--micro-batch-size", "3", "--learning-rate", "1e-2"),
    *("--init-rank", "3", "--target-rank", "2", "--eval-batch-size", "4", "--log-every", "5", "--final-steps", "5"),
    *("--eval-every", "3", "--export-formats", "none", "--no-evaluate-before"),
]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADALORA_DIST_CACHE", str(tmp_path / "cache"))


def run(recipe: str, folder: Path, *words: str, engine: str | None = None) -> str:
    environment, num_processes = (ENGINES[engine], 2) if engine else ({}, 1)
    code, said, errors = run_recipe(recipe, num_processes, [*FLAGS, "--output-dir", str(folder), *words], environment)
    assert code == 0, errors
    return str(said)


def scores_at(folder: Path) -> dict[int, dict[str, float]]:
    """The scores of each evaluation while training, by the number of steps before it."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {r["step"] + 1: {k[5:]: v for k, v in r.items() if k.startswith("eval_")} for r in records}
    return {step: scores for step, scores in found.items() if scores}


def check(folder: Path, metric: str, names: set[str], best_of: Any = min) -> None:
    found = scores_at(folder)
    assert list(found) == [3, 6, 9, 10] and all(set(scores) == names for scores in found.values()), found
    best = read_json(folder, "best.json")
    wanted = best_of(scores[metric] for step, scores in found.items() if step > 5)
    assert best["metric"] == metric and best["score"] == wanted
    assert (folder / "best" / f"step-{best['step']:08d}").is_dir() and read_json(folder, "results.json")["after"]


@pytest.mark.parametrize("engine", [None, "fsdp2"])
def test_classes_of_ones_own(tmp_path: Path, engine: str | None) -> None:
    write_encoder(tmp_path / "model", "bert")
    write_glue(tmp_path / "data")
    rows = [json.loads(line) for line in (tmp_path / "data/sst2/train.jsonl").read_text().splitlines()]
    named = [{"mail": row["sentence"], "kind": ["nasty", "nice"][row["label"]]} for row in rows]
    (tmp_path / "mails.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "mails.jsonl"), "--task", "mails"]
    words += ["--columns", "text=mail,label=kind", "--eval-share", "0.2", "--keep-best", "accuracy"]
    said = run("deberta_glue", tmp_path / "run", *words, "--export-formats", "merged", engine=engine)
    assert "76 training rows; evaluation: dev 19; while training: 19" in said and "is the one exported" in said
    check(tmp_path / "run", "accuracy", {"loss", "accuracy", "f1", "matthews"}, max)
    assert AutoConfig.from_pretrained(tmp_path / "run/merged").id2label == {0: "nasty", 1: "nice"}


def test_classes_and_numbers_under_zero3(tmp_path: Path) -> None:
    write_encoder(tmp_path / "model", "bert")
    write_glue(tmp_path / "data")
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data/stsb"), "--task", "own", "--regression"]
    run("deberta_glue", tmp_path / "run", *words, "--keep-best", "rmse", engine="zero3")
    check(tmp_path / "run", "rmse", {"loss", "pearson", "spearman", "rmse"})


def test_passages(tmp_path: Path) -> None:
    write_encoder(tmp_path / "model", "bert")
    write_squad(tmp_path / "data")
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data/v1"), "--keep-best", "f1"]
    words += ["--max-length", "96", "--doc-stride", "16", "--max-question-length", "16"]
    run("deberta_squad", tmp_path / "run", *words, "--eval-split", "validation")
    check(tmp_path / "run", "f1", {"loss", "exact", "f1"}, max)


def test_summaries(tmp_path: Path) -> None:
    model, data = write_summarization(tmp_path)
    words = ["--model", str(model), "--data", str(data / "xsum" / "train.jsonl"), "--keep-best", "loss"]
    words += ["--show-samples", "1", "--max-new-tokens", "8", "--num-beams", "1", "--max-source-length", "64"]
    said = run("summarize_bart", tmp_path / "run", *words, engine="ddp")
    assert said.count("Written now: ") == 6  # before the first step, four times while training, and at the end
    check(tmp_path / "run", "loss", {"loss", "perplexity", "rouge1", "rouge2", "rougeL", "rougeLsum"})


def test_facts(tmp_path: Path) -> None:
    model, data = write_e2e(tmp_path)
    words = ["--model", str(model), "--data", str(data), "--keep-best", "perplexity", "--max-length", "96"]
    run("gpt2_e2e", tmp_path / "run", *words, "--max-new-tokens", "8", "--num-beams", "1")
    assert {"loss", "perplexity", "bleu", "rougeL"} <= set(scores_at(tmp_path / "run")[3])


def test_questions_packed_and_not(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    write_model(tmp_path / "model", tmp_path / "data")
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--max-length", "64"]
    words += ["--evaluate-by", "likelihood", "--keep-best", "accuracy", "--no-group-by-length"]
    names = {"loss", "perplexity", "accuracy", "boolq likelihood", "openbookqa likelihood"}
    run("llama_commonsense", tmp_path / "plain", *words)
    check(tmp_path / "plain", "accuracy", names, max)
    for engine in (None, "ddp", "fsdp2", "zero3"):
        folder = tmp_path / f"packed-{engine}"
        said = run("llama_commonsense", folder, *words, "--packing", "on", engine=engine)
        assert "Packing: on; padding is " in said and "of the positions are saved" in said
        assert losses_of(folder) == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-4)
        assert read_json(folder, "rank_pattern.json") == read_json(tmp_path / "plain", "rank_pattern.json")


def test_replies_to_questions_are_shown(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    write_model(tmp_path / "model", tmp_path / "data")
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--max-length", "64"]
    said = run("llama_commonsense", tmp_path / "run", *words, "--show-samples", "1", engine="ddp")
    assert said.count("Of: Please answer with true or false") == said.count("Of: Which one is a") == 3
    assert said.count("Written now: ") == 6  # of each task one, at three evaluations


def test_a_packed_run_continues_exactly(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    write_model(tmp_path / "model", tmp_path / "data")
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--max-length", "64"]
    words += ["--evaluate-by", "likelihood", "--packing", "on", "--checkpoint-every", "4", "--keep-checkpoints", "5"]
    run("llama_commonsense", tmp_path / "whole", *words)
    source = tmp_path / "whole/checkpoints/step-00000004"
    run("llama_commonsense", tmp_path / "rest", *words, "--resume", str(source))
    assert losses_of(tmp_path / "rest") == losses_of(tmp_path / "whole")


def test_answers_to_questions_of_two_turns(tmp_path: Path) -> None:
    tokenizer, style = byte_tokenizer(bos=False), STYLES["chatml"]
    tokenizer.add_special_tokens({"additional_special_tokens": list(style.specials)})
    tokenizer.chat_template = style.plain
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    rows = demo_conversations("train")[:30]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"question_id": 81 + n, "category": "x", "turns": [f"What is {n}?", "Why?"]} for n in range(3)]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--max-length", "256"]
    words += ["--answer", str(tmp_path / "question.jsonl"), "--answer-tokens", "5", "--max-new-tokens", "4"]
    said = run("llama_sft", tmp_path / "run", *words, "--show-samples", "2", "--keep-best", "loss", engine="ddp")
    assert said.count("Sample 2") >= 5 and "Best model: that of step" in said
    answers = [json.loads(line) for line in (tmp_path / "run/answers.jsonl").read_text().splitlines()]
    assert [a["question_id"] for a in answers] == [81, 82, 83] and len({a["answer_id"] for a in answers}) == 3
    for answer in answers:
        assert set(answer) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert answer["model_id"] == "run" and [len(c["turns"]) for c in answer["choices"]] == [2]
    (tmp_path / "question.jsonl").write_text('{"question_id": 1, "turns": "What?"}\n')
    code, _, errors = run_recipe("llama_sft", 1, [*FLAGS, *words, "--output-dir", str(tmp_path / "other")])
    assert code == 2 and "question.jsonl:1: field turns is 'What?'; legal: a list of texts" in errors
