"""Encoder-decoders: their loss, their data, ROUGE, and the recipe on one process and on two of every engine."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from adalora_dist.artifacts.export import load_adapter
from adalora_dist.config.generation import GenerationConfig
from adalora_dist.io.errors import UserError
from adalora_dist.tasks.batches import collate_pairs
from adalora_dist.tasks.demo_models.pretrained import word_tokenizer
from adalora_dist.tasks.evaluation.batches import gather_lists
from adalora_dist.tasks.evaluation.rouge import METRICS, rouge_scores
from adalora_dist.tasks.evaluation.texts import generate_texts
from adalora_dist.tasks.losses import decoder_inputs, decoder_start_token, seq2seq_loss
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.table import digest_of_tokens
from adalora_dist.tasks.rows.tokens import IGNORED
from adalora_dist.tasks.rows.towns import towns_of
from adalora_dist.tasks.summarization.config import SummarizationDataConfig
from adalora_dist.tasks.summarization.demo import demo_reports
from adalora_dist.tasks.summarization.rows import encode_summaries, load_summaries
from tests.support.paths import shared
from tests.support.ranks import import_deepspeed, import_package, run_ranks
from tests.support.recipe_runs import ENGINES, losses_of, read_json, run_recipe
from tests.support.settings import adapter_flags
from tests.support.summarization_runs import ADAPTER, FLAGS, MATRICES, STEPS, arguments
from tests.support.tiny_text_project import NUM_TEST, NUM_TRAIN, tiny_bart, write_jsonl

import_deepspeed()
import_package()


# ----------------------------------------------------------------------------------------------------------- the loss


def test_decoder_reads_labels_one_step_later() -> None:
    labels = torch.tensor([[5, 6, 7], [8, 9, IGNORED]])
    assert decoder_inputs(labels, 0, 2).tolist() == [[2, 5, 6], [2, 8, 9]]
    assert labels.tolist() == [[5, 6, 7], [8, 9, IGNORED]]


def _loss(rank: int, world_size: int) -> tuple[float, float, float, float]:
    model = tiny_bart(40)
    rows = [{"input_ids": [4, 5, 6, 7], "labels": [8, 9, 10]}, {"input_ids": [11], "labels": [12, 13, 14, 15, 2]}]
    loss_sum = seq2seq_loss(rows, 0, decoder_start_token(model), torch.device("cpu"))
    batch = collate_pairs(rows, 0)
    mean = model(**batch).loss  # transformers' own: mean over the eight labels
    alone = loss_sum(model, [0]) + loss_sum(model, [1])  # without padding
    empty = loss_sum(model, [])
    empty.backward()
    gradient = sum(p.grad.abs().sum().item() for p in model.parameters() if p.grad is not None)
    return loss_sum(model, [0, 1]).item(), alone.item(), 8 * mean.item(), empty.item() + gradient


def test_loss_is_the_sum_over_labels_and_padding_counts_nothing() -> None:
    [(together, alone, transformers, nothing)] = run_ranks(1, _loss)
    assert together == pytest.approx(transformers, rel=1e-5) == pytest.approx(alone, rel=1e-5)
    assert nothing == 0 and together > 8


# ----------------------------------------------------------------------------------------------------------- the data


def test_rows_without_text_are_errors_or_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"document": "a fire", "summary": "fire"},
        {"document": " ", "summary": "x"},
        {"document": "b", "summary": ""},
    ]
    file = tmp_path / "cnn_dailymail" / "train.jsonl"
    write_jsonl(file, rows)
    write_jsonl(tmp_path / "cnn_dailymail" / "validation.jsonl", rows[:1])
    data = SummarizationDataConfig(source=str(tmp_path), task="cnn_dailymail", bad_rows="error")
    with pytest.raises(UserError, match=r"train.jsonl:2: field document is ' '; legal: a text; .* --bad-rows skip"):
        load_summaries(data)
    bad = BadRows("skip")
    with caplog.at_level(logging.WARNING):
        loaded = load_summaries(data, bad)
    assert [loaded[split]["document"][:] for split in ("train", "test")] == [["a fire"], ["a fire"]]
    assert bad.counts == {str(file): 2} and "evaluating on validation.jsonl" in caplog.text
    first = data.model_copy(update={"max_train_rows": 1})
    assert load_summaries(first)["train"]["summary"][:] == ["fire"]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ('{"document": ', "not valid JSON"),
        (b'{"document": "\xff"}', "not UTF-8"),
        ("[1]", "the row is a list"),
        ('{"document": "a"}', "field summary is None"),
        ('{"document": 3, "summary": "b"}', "field document is 3"),
    ],
)
def test_a_corrupt_row_is_named_or_left_out(tmp_path: Path, broken: str | bytes, says: str) -> None:
    for name in ("train", "test"):
        write_jsonl(tmp_path / "xsum" / f"{name}.jsonl", [{"document": f"text {k}", "summary": "s"} for k in range(5)])
    file = tmp_path / "xsum" / "train.jsonl"
    lines = file.read_bytes().splitlines()
    lines[2] = broken if isinstance(broken, bytes) else broken.encode()
    file.write_bytes(b"\n\n".join(lines) + b"\n")
    data = SummarizationDataConfig(source=str(tmp_path), bad_rows="error")
    with pytest.raises(UserError, match=f"xsum/train.jsonl:5: .*{says}"):
        load_summaries(data)
    bad = BadRows("skip")
    assert load_summaries(data, bad)["train"]["document"][:] == ["text 0", "text 1", "text 3", "text 4"]
    assert bad.counts == {str(file): 1}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"document": "a", "text": "b"}\n', ["no column summary", "document, text"]),
        ("not json\n", ["train.jsonl:1: not valid JSON"]),
        ("", ["train.jsonl cannot be read"]),
        ('{"document": "", "summary": ""}\n', ["train.jsonl:1: field document is ''"]),
        (None, ["train.jsonl, train.parquet"]),
    ],
)
def test_bad_files_get_one_line(tmp_path: Path, text: str | None, parts: list[str]) -> None:
    (tmp_path / "xsum").mkdir()
    if text is not None:
        (tmp_path / "xsum" / "train.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        load_summaries(SummarizationDataConfig(source=str(tmp_path), bad_rows="error"))
    assert all(part in str(error.value) for part in parts), error.value


def test_both_sides_are_cut_and_counted() -> None:
    data = SummarizationDataConfig(max_source_length=10, max_target_length=5, max_train_rows=3, max_eval_rows=2)
    rows = load_summaries(data)["train"]
    assert len(rows) == 3
    tokenizer = word_tokenizer([text for report in demo_reports("train") for text in report])
    encoded = encode_summaries(rows, tokenizer, data)
    for row in encoded:
        assert (len(row["input_ids"]), len(row["labels"])) == (10, 5) == (row["num_source"], row["num_targets"])
        assert row["input_ids"][0] == row["labels"][0] == tokenizer.bos_token_id
        assert row["input_ids"][-1] == row["labels"][-1] == tokenizer.eos_token_id


def test_rows_are_known_by_their_tokens() -> None:
    columns = {"input_ids": [[k, k + 1, 5] for k in range(1500)], "labels": [[k % 7] for k in range(1500)]}
    rows = Dataset.from_dict(columns)
    cut = concatenate_datasets([rows.select(range(700)), rows.select(range(700, 1500))])
    assert digest_of_tokens(cut) == digest_of_tokens(rows)
    for name, value in (("input_ids", [3, 4, 6]), ("labels", [8])):
        values = [*columns[name][:1200], value, *columns[name][1201:]]
        assert digest_of_tokens(Dataset.from_dict(columns | {name: values})) != digest_of_tokens(rows)
    assert digest_of_tokens(rows.select(range(1499, -1, -1))) != digest_of_tokens(rows)


def test_no_training_summary_names_a_town_of_the_test() -> None:
    test_towns = set(towns_of("test"))
    assert len(test_towns) >= 5
    assert {report.summary.split()[0] for report in demo_reports("test")} == test_towns
    assert not {report.summary.split()[0] for report in demo_reports("train")} & test_towns


# -------------------------------------------------------------------------------------------------------------- ROUGE

TEXTS = ["The cat sat. It ran.", "two dogs", "nothing alike"]
REFERENCES = ["The cat sat. It ran.", "two cats", "quite different"]


def _rouge(rank: int, world_size: int) -> dict[str, float]:
    return rouge_scores(TEXTS, REFERENCES, rank, world_size, gather_lists)


@pytest.mark.parametrize("world_size", [1, 2])
def test_rouge_is_the_mean_over_rows_whoever_scores_them(world_size: int) -> None:
    for scores in run_ranks(world_size, _rouge):
        # 1, 1/2 and 0 for single words; 1, 0 and 0 for pairs.
        expected = {"rouge1": 50.0, "rouge2": 100 / 3, "rougeL": 50.0, "rougeLsum": 50.0}
        assert scores == pytest.approx(expected)


def _texts(rank: int, world_size: int, summaries: Path) -> list[str]:
    model = AutoModelForSeq2SeqLM.from_pretrained(summaries / "model")
    tokenizer = AutoTokenizer.from_pretrained(summaries / "model")
    sources = [[1, *range(5, 5 + length), 2] for length in (3, 30, 7, 12, 1)]
    settings = GenerationConfig(num_beams=3, max_new_tokens=8, eval_batch_size=2)
    ranks: Any = {"rank": rank, "world_size": world_size, "synced_gpus": world_size > 1}
    return generate_texts(model, tokenizer, sources, [len(source) for source in sources], settings, **ranks)


def test_texts_do_not_depend_on_the_number_of_processes(summaries: Path) -> None:
    [one] = run_ranks(1, _texts, summaries)
    assert len(one) == 5 and len(set(one)) > 1
    for world_size in (2, 3):
        assert run_ranks(world_size, _texts, summaries) == [one] * world_size


# --------------------------------------------------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def single(summaries: Path) -> Path:
    folder = summaries / "single"
    code, output, errors = run_recipe("summarize_bart", 1, arguments(summaries, folder))
    assert code == 0, errors
    assert f"{NUM_TRAIN} training rows, {NUM_TEST} evaluation rows" in output and "Total rank 64, budget 64" in output
    return folder


def test_recipe_learns_meets_its_budget_and_exports(summaries: Path, single: Path) -> None:
    losses, pattern = losses_of(single), read_json(single, "rank_pattern.json")
    assert len(losses) == STEPS and sum(losses[-3:]) < sum(losses[:3]) - 1
    assert len(pattern) == MATRICES and sum(pattern.values()) == 2 * MATRICES and len(set(pattern.values())) > 1
    assert len(read_json(single, "texts.json")) == NUM_TEST
    merged = AutoModelForSeq2SeqLM.from_pretrained(single / "merged")
    adapted = AutoModelForSeq2SeqLM.from_pretrained(summaries / "model")
    plain = AutoModelForSeq2SeqLM.from_pretrained(summaries / "model")
    load_adapter(adapted, single / "adapter")
    with torch.no_grad():
        ids = {"input_ids": torch.tensor([[1, 5, 6, 7, 2]]), "decoder_input_ids": torch.tensor([[2, 1, 8]])}
        logits = [model(**ids).logits for model in (merged, adapted, plain)]
    assert (logits[0] - logits[1]).abs().max() < 1e-4 and (logits[2] - logits[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    "engine", ["zero3", *(pytest.param(e, marks=pytest.mark.slow) for e in ("ddp", "fsdp2", "zero2"))]
)
def test_two_processes_do_what_one_does(summaries: Path, single: Path, engine: str) -> None:
    folder = summaries / engine
    code, _, errors = run_recipe("summarize_bart", 2, arguments(summaries, folder), ENGINES[engine])
    assert code == 0, errors
    facts = read_json(folder, "run.json")
    assert (facts["engine"], facts["num_processes"]) == (engine, 2)
    assert losses_of(folder) == pytest.approx(losses_of(single), abs=1e-4)
    assert read_json(folder, "rank_pattern.json") == read_json(single, "rank_pattern.json")
    results, expected = read_json(folder, "results.json"), read_json(single, "results.json")
    assert results["before"] == expected["before"]
    assert read_json(folder, "texts.json") == read_json(single, "texts.json") and results == expected


def test_full_fine_tuning_and_its_export(summaries: Path, tmp_path: Path) -> None:
    flags = ["--method", "full", "--learning-rate", "1e-3", "--no-evaluate-before", "--max-steps", "3"]
    code, output, errors = run_recipe("summarize_bart", 1, arguments(summaries, tmp_path / "run", *flags))
    assert code == 0, errors
    assert "Merged model in plain transformers" in output and not (tmp_path / "run" / "adapter").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("task", "source", "target"), [("xsum", 256, 48), ("cnn_dailymail", 384, 80)])
def test_slices_of_the_real_data(summaries: Path, tmp_path: Path, task: str, source: int, target: int) -> None:
    """Real articles, read, cut, trained on and summarised; a tiny model has nothing to say about ROUGE."""
    file = shared(f"data/summarization/{task}/train.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    for split, part in (("train", lines[:-16]), ("test", lines[-16:])):
        (tmp_path / task).mkdir(exist_ok=True)
        (tmp_path / task / f"{split}.jsonl").write_text("".join(part), encoding="utf-8")
    tokenizer = word_tokenizer([text for line in lines for text in json.loads(line).values()])
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_bart(len(tokenizer), max_positions=512).save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--data", str(tmp_path), "--output-dir", str(tmp_path / "run"), *FLAGS]
    words += adapter_flags([], **ADAPTER)
    words += ["--task", task, "--max-source-length", str(source), "--max-target-length", str(target)]
    words += ["--max-new-tokens", str(target), "--batch-size", "12"]
    code, output, errors = run_recipe("summarize_bart", 2, words, ENGINES["zero3"])
    assert code == 0, errors
    assert "184 training rows, 16 evaluation rows" in output
    losses, results = losses_of(tmp_path / "run"), read_json(tmp_path / "run", "results.json")
    assert sum(losses[-3:]) < sum(losses[:3]) and len(read_json(tmp_path / "run", "texts.json")) == 16
    for scores in results.values():
        assert set(scores) == set(METRICS) and all(0 <= score <= 100 for score in scores.values())
