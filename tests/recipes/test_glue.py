"""The GLUE recipe: rows, cache, metrics, the recipe's real commands on every engine, and what it exports."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adalora_dist.artifacts.export import load_adapter
from adalora_dist.config.methods import AdaLoraConfig, FullConfig, HeadConfig
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.sites import trained_modules
from adalora_dist.tasks.evaluation.predict import predict
from adalora_dist.tasks.glue.config import GLUE_TASKS, GlueDataConfig
from adalora_dist.tasks.glue.demo import demo_sentences, demo_sentences_folder
from adalora_dist.tasks.glue.metrics import classification_metrics, mean_and_deviation
from adalora_dist.tasks.glue.rows import TASKS, encode_texts, labelled_text, load_glue
from adalora_dist.tasks.glue.scores import score
from adalora_dist.tasks.losses import classification_loss
from adalora_dist.tasks.rows import token_cache
from tests.support.paths import ROOT, shared
from tests.support.quantized_runs import of_methods
from tests.support.ranks import import_deepspeed, import_package, run_ranks
from tests.support.recipe_runs import ENGINES, Run, run_command, run_recipe
from tests.support.refusals import refusal
from tests.support.settings import adapter_flags, adapter_section
from tests.support.tiny_encoders import encoder_tokenizer, write_encoder, write_glue, write_jsonl

import_deepspeed()
import_package()

RECIPE = ROOT / "recipes" / "deberta_glue.py"
STEPS = 16
FLAGS = [
    *("--max-steps", str(STEPS), "--batch-size", "16", "--micro-batch-size", "8", "--learning-rate", "1e-2"),
    *("--log-every", "8", "--eval-batch-size", "4"),
]
ADAPTER = {"init_rank": 3, "target_rank": 2, "start": "paper", "init": "orthonormal"}


class Project:
    """Tiny encoders and tiny data in a folder, and a cache beside them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        write_glue(path / "glue")
        for kind in ("bert", "deberta"):
            write_encoder(path / kind, kind)

    def arguments(self, output_dir: Path, *more: str, model: str = "bert", task: str = "sst2") -> list[str]:
        where = ["--model", str(self.path / model), "--data", str(self.path / "glue"), "--task", task]
        return [*where, *FLAGS, *adapter_flags(more, **ADAPTER), "--output-dir", str(output_dir), *more]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


@pytest.fixture(autouse=True)
def _cache(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADALORA_DIST_CACHE", str(project.path / "cache"))


def run_of(folder: Path, arguments: list[str], engine: str | None = None) -> Run:
    """The recipe on one process, or on two of ``engine``."""
    code, _, errors = run_recipe("deberta_glue", 2 if engine else 1, arguments, ENGINES[engine] if engine else {})
    assert code == 0, errors
    return Run(folder)


# ------------------------------------------------------------------------------------------------------------- rows


def test_every_task_reads_its_rows_from_both_spellings() -> None:
    assert tuple(TASKS) == GLUE_TASKS and len(TASKS) == 8
    for task in TASKS.values():
        label = 2.5 if task.num_labels == 1 else task.num_labels - 1
        plain = ("sentence",) if len(task.texts) == 1 else ("sentence1", "sentence2")
        for names in (task.texts, plain):
            row = {name: f"text {k}" for k, name in enumerate(names)} | {"label": label, "idx": 3}
            expected = tuple(f"text {k}" for k in range(len(names)))
            assert (labelled_text(task, row, "here").texts, labelled_text(task, row, "here").label) == (expected, label)


BAD_ROWS = [
    (["a", 1], "the row is a list"),
    ({"sentence": "", "label": 1}, "field sentence is ''"),
    ({"text": "a", "label": 1}, "field sentence is None"),
    ({"sentence": "a"}, "field label is None"),
    ({"sentence": "a", "label": -1}, "field label is -1; legal: 0 to 1; test sets have no labels"),
    ({"sentence": "a", "label": True}, "field label is True"),
    ({"sentence": "a", "label": 0.5}, "field label is 0.5"),
]


@pytest.mark.parametrize(("row", "says"), BAD_ROWS, ids=[says for _, says in BAD_ROWS])
def test_bad_rows_are_named(tmp_path: Path, row: Any, says: str) -> None:
    write_jsonl(tmp_path / "sst2" / "train.jsonl", [{"sentence": "a", "label": 0}, row])
    message = refusal(load_glue, GlueDataConfig(source=str(tmp_path)))
    assert f"{tmp_path}/sst2/train.jsonl:2" in message and says in message


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert "no folder" in refusal(load_glue, GlueDataConfig(source=str(tmp_path)))
    write_jsonl(tmp_path / "sst2" / "train.jsonl", [{"sentence": "a", "label": 0}])
    message = refusal(load_glue, GlueDataConfig(source=str(tmp_path)))
    assert "validation.jsonl" in message and "dev.parquet" in message


def test_row_limits_and_the_two_sets_of_mnli(project: Project) -> None:
    data = GlueDataConfig(source=str(project.path / "glue"), task="mnli", max_train_rows=7, max_eval_rows=5)
    train, sets = load_glue(data)
    assert len(train) == 7 and {name: len(rows) for name, rows in sets.items()} == {"matched": 5, "mismatched": 5}
    assert sets["matched"] != sets["mismatched"]


def test_real_data_can_be_read() -> None:
    folder = shared("data/glue")
    sizes = {"cola": (8551, 1043), "rte": (2490, 277), "mrpc": (3576, 500), "sst2": (8000, 872)}
    for task, (num_train, num_dev) in sizes.items():
        train, sets = load_glue(GlueDataConfig(source=str(folder), task=task))
        assert (len(train), len(sets["dev"])) == (num_train, num_dev)
        assert {row.label for row in train} == {0.0, 1.0}


def test_built_in_sentences_share_no_word_that_matters() -> None:
    rows = {split: demo_sentences(split) for split in ("train", "dev")}
    assert (len(rows["train"]), len(rows["dev"])) == (1200, 400)
    for part in rows.values():
        assert sum(row["label"] for row in part) == len(part) / 2
        assert len({row["sentence"] for row in part}) == len(part)
    words = {split: {w.strip(".!,") for row in part for w in row["sentence"].split()} for split, part in rows.items()}
    common = words["train"] & words["dev"]
    assert not common & {"terrible", "wonderful", "awful", "soup", "hotel", "boring", "novel"}
    assert len(words["train"] - common) > 60 and len(words["dev"] - common) > 20
    assert load_glue(GlueDataConfig(source=str(demo_sentences_folder())))[0][0].texts == (rows["train"][0]["sentence"],)
    assert demo_sentences("train") == demo_sentences("train") != demo_sentences("train", seed=1)


# ------------------------------------------------------------------------------------------------------------ cache


def test_tokens_come_from_the_cache_and_are_the_same(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = encoder_tokenizer()
    rows, _ = load_glue(GlueDataConfig(source=str(project.path / "glue"), task="stsb"))
    first = encode_texts(rows, tokenizer, 12, "tokens")
    assert max(len(row["input_ids"]) for row in first) == 12
    assert first[0]["token_type_ids"][0] == 0 and first[0]["token_type_ids"][-1] == 1
    files = set((project.path / "cache" / "tokens").iterdir())

    made = []
    write = token_cache._write
    monkeypatch.setattr(token_cache, "_write", lambda path, columns: made.append(path) or write(path, columns))
    assert encode_texts(rows, tokenizer, 12, "tokens") == first and not made
    assert encode_texts(rows, tokenizer, 13, "tokens") != first and len(made) == 1  # another length
    encode_texts(rows[:-1], tokenizer, 12, "tokens")  # other rows
    tokenizer.add_tokens(["soup is"])
    encode_texts(rows, tokenizer, 12, "tokens")  # another tokenizer
    assert len(made) == 3 and not set(made) & files

    made.clear()
    for file in files:
        file.write_bytes(b"PK\x03\x04 cut off")
    assert encode_texts(rows, encoder_tokenizer(), 12, "tokens") == first and len(made) == 1


# ---------------------------------------------------------------------------------------------------------- metrics


def test_metrics_of_a_case_worked_out_by_hand() -> None:
    labels, guesses = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1, 1, 0, 0, 0]
    tp, fp, fn, tn = 3, 1, 1, 5
    found = classification_metrics(("matthews", "accuracy", "f1"), guesses, labels)
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    expected = {"matthews": (tp * tn - fp * fn) / root, "accuracy": 0.8, "f1": 2 * tp / (2 * tp + fp + fn)}
    assert found == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_correlations_against_their_definitions(pairs: list[tuple[int, int]]) -> None:
    x, y = (np.array(part, dtype=float) for part in zip(*pairs, strict=True))
    found = classification_metrics(("pearson", "spearman"), list(y), list(x))
    if len(set(x)) < 2 or len(set(y)) < 2:
        assert found == {"pearson": 0.0, "spearman": 0.0}
        return

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - a.mean(), b - b.mean()
        return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))

    def ranks(a: np.ndarray) -> np.ndarray:  # ties share the mean of their places
        return np.array([(a < value).sum() + ((a == value).sum() + 1) / 2 for value in a])

    assert found["pearson"] == pytest.approx(correlation(x, y), abs=1e-9)
    assert found["spearman"] == pytest.approx(correlation(ranks(x), ranks(y)), abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_matthews_is_the_correlation_of_two_binary_numbers(pairs: list[tuple[int, int]]) -> None:
    x, y = ([float(v) for v in part] for part in zip(*pairs, strict=True))
    found = classification_metrics(("matthews", "pearson"), y, x)
    assert found["matthews"] == pytest.approx(found["pearson"], abs=1e-9)


def test_regression_is_scored_by_its_number_and_classes_by_the_largest_logit() -> None:
    numbers = [(torch.tensor([value]),) for value in (0.5, 1.5, 2.0)]
    assert score("dev", TASKS["stsb"], numbers, [1.0, 3.0, 4.0]) == pytest.approx(
        {"dev pearson": 1.0, "dev spearman": 1.0}
    )
    logits = [(torch.tensor([0.0, 3.0, 1.0]),), (torch.tensor([2.0, 0.0, 1.0]),)]
    assert score("matched", TASKS["mnli"], logits, [1.0, 2.0]) == {"matched accuracy": 0.5}
    assert score("dev", TASKS["sst2"], 1.0, [1.0, 1.0, 0.0]) == {"dev accuracy": pytest.approx(2 / 3)}


def test_mean_and_sample_deviation() -> None:
    assert mean_and_deviation([{"f1": 1.0}, {"f1": 2.0}, {"f1": 4.5}]) == {
        "f1": {"mean": 2.5, "deviation": pytest.approx(math.sqrt((1.5**2 + 0.5**2 + 2**2) / 2))}
    }
    assert mean_and_deviation([{"f1": 1.0}])["f1"]["deviation"] == 0


# --------------------------------------------------------------------------------------------- methods and their losses


@pytest.mark.parametrize("kind", ["bert", "deberta"])
def test_what_each_method_trains(project: Project, kind: str) -> None:
    def model() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(project.path / kind, num_labels=2)

    heads = {"bert": ["classifier"], "deberta": ["pooler", "classifier"]}[kind]
    plain = model()
    assert sorted(trained_modules(plain, AdaLoraConfig(train_modules=("task-head",)))) == sorted(heads)
    head = {f"{h}.{n}" for h in heads for n, _ in plain.get_submodule(h).named_parameters()}
    for method in ("adalora", "lora", "head", "full"):
        adapted = model()
        matrices = adapt(adapted, adapter_section(method, init_rank=2, train_modules=("task-head",)))
        trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
        factors = {name for name in trained if name.rpartition(".")[2] in ("P", "Qt", "lam")}
        if method == "full":
            assert trained == {name for name, _ in adapted.named_parameters()} and not matrices
        else:
            assert trained - factors == head
            assert len(matrices) == (0 if method == "head" else 12 + (kind == "bert"))  # BERT's pooler is a matrix, too
            assert len(factors) == 2 * len(matrices) + (method == "adalora")


def test_a_head_that_is_tied_or_missing_is_refused(project: Project) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    settings = HeadConfig(train_modules=("task-head",))
    small = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    assert "nothing outside its backbone" in refusal(adapt, BertModel(small), settings)
    assert "task-head: cls is tied" in refusal(adapt, BertForMaskedLM(small), settings)
    half = refusal(adapt, BertModel(small).bfloat16(), FullConfig())
    assert "bfloat16" in half and "float32" in half


@pytest.mark.parametrize("num_labels", [1, 3])
def test_loss_is_transformers_own_summed_over_rows(project: Project, num_labels: int) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(project.path / "bert", num_labels=num_labels).eval()
    inputs = [{"input_ids": ids, "token_type_ids": [0] * len(ids)} for ids in ([1, 4, 5, 2], [1, 6, 2])]
    labels = [0.5, 2.0] if num_labels == 1 else [2.0, 0.0]
    loss_sum = classification_loss(inputs, labels, num_labels, 0, torch.device("cpu"))
    with torch.no_grad():
        total = sum(
            model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([label]).to(dtype)).loss.item()
            for row, label in zip(inputs, labels, strict=True)
            for dtype in [torch.float32 if num_labels == 1 else torch.long]
        )
        assert loss_sum(model, [0, 1]).item() == pytest.approx(total, rel=1e-5)
        assert loss_sum(model, []).item() == 0


def _predicted(rank: int, world_size: int, folder: Path, inputs: list[dict[str, list[int]]]) -> list[float]:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    rows = predict(model, inputs, 0, 4, rank, world_size)
    return torch.cat([logits for (logits,) in rows]).tolist()


def test_predictions_are_the_same_to_the_last_bit_on_1_and_3_ranks(project: Project) -> None:
    rows, _ = load_glue(GlueDataConfig(source=str(project.path / "glue"), task="stsb", max_train_rows=18))
    inputs = encode_texts(rows, encoder_tokenizer(), 32, "tokens")
    assert len({len(row["input_ids"]) for row in inputs}) > 2  # batches are padded differently
    [single] = run_ranks(1, _predicted, project.path / "bert", inputs)
    assert len(set(single)) > 40
    assert run_ranks(3, _predicted, project.path / "bert", inputs) == [single] * 3


# ------------------------------------------------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def single(project: Project, _module_cache: None) -> dict[str, Run]:
    """By model, the one-process run that others are compared with."""
    runs = {}
    for kind in ("bert", "deberta"):
        folder = project.path / f"single_{kind}"
        runs[kind] = run_of(folder, project.arguments(folder, model=kind))
    return runs


@pytest.fixture(scope="module")
def _module_cache(project: Project) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADALORA_DIST_CACHE", str(project.path / "cache"))
        yield


@pytest.mark.parametrize("kind", ["bert", "deberta"])
def test_budget_is_met_and_the_merged_model_is_the_trained_one(
    single: dict[str, Run], project: Project, kind: str
) -> None:
    run = single[kind]
    assert sum(run.pattern.values()) == 2 * len(run.pattern) and len(run.pattern) == 12 + (kind == "bert")
    assert run.losses[-4:].mean() < run.losses[:4].mean()
    assert set(run.results) == {"before", "after", "merged"}
    assert run.results["merged"] == run.results["after"]

    merged = AutoModelForSequenceClassification.from_pretrained(run.folder / "merged").eval()
    adapted = AutoModelForSequenceClassification.from_pretrained(project.path / kind, num_labels=2).eval()
    load_adapter(adapted, run.folder / "adapter")
    trained = load_file(run.folder / "adapter" / "trained.safetensors")
    assert not adapted.load_state_dict(trained, strict=False).unexpected_keys and "classifier.weight" in trained
    ids = torch.tensor([AutoTokenizer.from_pretrained(run.folder / "merged")("the soup is nasty")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        ("fsdp2", "bert"),  # its pooler is a matrix outside the layers
        *(
            pytest.param(*launch, marks=pytest.mark.slow)
            for launch in (("ddp", "bert"), ("fsdp2", "deberta"), ("zero2", "deberta"), ("zero3", "bert"))
        ),
    ],
)
def test_two_processes_do_what_one_does(project: Project, single: dict[str, Run], engine: str, kind: str) -> None:
    folder = project.path / f"{engine}_{kind}"
    run, expected = run_of(folder, project.arguments(folder, model=kind), engine), single[kind]
    assert (run.facts["engine"], run.facts["num_processes"]) == (engine, 2)
    assert run.facts["num_trainable_parameters"] == expected.facts["num_trainable_parameters"]
    assert run.pattern == expected.pattern
    torch.testing.assert_close(run.losses, expected.losses, rtol=0, atol=1e-4)
    assert run.results["after"] == run.results["merged"] == expected.results["after"]


def test_a_head_of_16_bits_under_fsdp2(project: Project, tmp_path: Path) -> None:
    """Beside lambda, which has 32: FSDP2 takes trained parameters of one type in a group."""
    more = ["--dtype", "bfloat16", "--max-steps", "6", "--export-formats", "none", "--no-evaluate-before"]
    run = run_of(tmp_path / "run", project.arguments(tmp_path / "run", *more, model="deberta"), "fsdp2")
    assert run.facts["engine"] == "fsdp2" and len(run.losses) == 6 and run.losses.isfinite().all()
    assert sum(run.pattern.values()) == 2 * len(run.pattern)


def test_fsdp2_wraps_the_layers_of_deberta_one_by_one(project: Project) -> None:
    from adalora_dist.backbones.load import load_backbone
    from adalora_dist.config.sections import ModelConfig

    for kind, layer in (("bert", "BertLayer"), ("deberta", "DebertaV2Layer")):
        config = ModelConfig(name=str(project.path / kind), dtype="float32")
        model, _ = load_backbone(config, AutoModelForSequenceClassification, changes={"num_labels": 2})
        assert model._no_split_modules == {layer}  # nothing around the embeddings, which accelerate shards first


@pytest.mark.parametrize("method", ["lora", "head", "full"])
def test_other_methods_go_the_same_way(project: Project, tmp_path: Path, method: str) -> None:
    rate = {"lora": "3e-3", "head": "3e-2", "full": "1e-3"}[method]
    more = ["--method", method, "--learning-rate", rate]
    run = run_of(tmp_path / "run", project.arguments(tmp_path / "run", *more))
    assert run.losses[-4:].mean() < run.losses[:4].mean()
    assert run.results["merged"] == run.results["after"]
    assert run.pattern == ({name: 3 for name in run.pattern} if method == "lora" else {})
    assert "budget" not in run.metrics[0] and run.facts["method"] == method
    assert (tmp_path / "run" / "adapter").exists() == (method == "lora")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "merged")
    base = AutoModelForSequenceClassification.from_pretrained(project.path / "bert", num_labels=2)
    changed = {
        name
        for (name, new), (_, old) in zip(merged.named_parameters(), base.named_parameters(), strict=True)
        if not torch.equal(new, old)
    }
    if method == "head":
        assert changed == {"classifier.weight", "classifier.bias"}
    else:
        assert "bert.encoder.layer.1.attention.self.value.weight" in changed
        assert ("bert.embeddings.word_embeddings.weight" in changed) == (method == "full")


@pytest.mark.parametrize(("engine", "method"), [("fsdp2", "full"), ("zero3", "full"), ("zero2", "head")])
@pytest.mark.slow
def test_other_methods_on_sharded_engines(project: Project, tmp_path: Path, engine: str, method: str) -> None:
    more = ["--method", method, "--learning-rate", "1e-3"]
    expected = run_of(tmp_path / "single", project.arguments(tmp_path / "single", *more))
    run = run_of(tmp_path / engine, project.arguments(tmp_path / engine, *more), engine)
    torch.testing.assert_close(run.losses, expected.losses, rtol=0, atol=1e-4)
    assert run.results["after"] == run.results["merged"] == expected.results["after"]


def test_regression_and_two_evaluation_sets(project: Project, tmp_path: Path) -> None:
    quick = ("--max-steps", "4", "--classifier-dropout", "0.1")
    run = run_of(tmp_path / "stsb", project.arguments(tmp_path / "stsb", *quick, task="stsb"))
    assert set(run.results["after"]) == {"dev pearson", "dev spearman"}
    config = json.loads((tmp_path / "stsb" / "merged" / "config.json").read_text())
    assert config["problem_type"] == "regression" and len(config["id2label"]) == 1
    assert config["classifier_dropout"] == 0.1
    run = run_of(tmp_path / "mnli", project.arguments(tmp_path / "mnli", *quick, task="mnli"))
    assert set(run.results["after"]) == {"matched accuracy", "mismatched accuracy"}
    assert set(run.results["merged"]) == {"matched accuracy"}


def test_seeds_are_runs_of_their_own_and_their_mean_is_reported(project: Project, tmp_path: Path) -> None:
    quick = ("--max-steps", "6", "--export-formats", "none", "--no-evaluate-before")
    arguments = project.arguments(tmp_path / "many", *quick, "--seeds", "4", "5")
    code, _, errors = run_recipe("deberta_glue", 1, arguments)
    assert code == 0, errors
    results = json.loads((tmp_path / "many" / "results.json").read_text())
    alone = run_of(tmp_path / "alone", project.arguments(tmp_path / "alone", *quick, "--seed", "5"))
    second = Run(tmp_path / "many" / "seed_5")
    assert torch.equal(second.losses, alone.losses)
    assert not torch.equal(second.losses, Run(tmp_path / "many" / "seed_4").losses)
    scores = [run["dev accuracy"] for run in results["runs"]]
    assert scores[1] == alone.results["after"]["dev accuracy"]
    assert results["summary"]["dev accuracy"]["mean"] == pytest.approx(sum(scores) / 2)
    assert results["majority"]["dev accuracy"] > 0.5


@pytest.mark.parametrize("method", of_methods("nf4", "fp8"))
def test_a_quantised_encoder_trains_and_merges(method: str, project: Project, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    more = ("--quantization", method, "--merge-into", "dequantized", "--max-steps", "6")
    run = run_of(tmp_path / "run", project.arguments(tmp_path / "run", *more, model="deberta"))
    assert run.results["merged"] == run.results["after"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--task", "rte"], ["no folder", "rte"]),
        (["--method", "head", "--train-modules", "none"], ["method head", "train_modules", "task-head"]),
        (["--method", "full", "--dtype", "bfloat16"], ["method full", "bfloat16", "float32"]),
        (["--method", "full", "--quantization", "nf4"], ["quantization nf4", "method full"]),
        (["--seeds", "1", "1"], ["seeds lists 1 more than once"]),
    ],
)
def test_mistakes_get_one_line(project: Project, tmp_path: Path, more: list[str], says: list[str]) -> None:
    arguments = project.arguments(tmp_path / "run", *more)
    process = run_command(sys.executable, RECIPE, *arguments)
    lines = process.stderr.splitlines()
    assert process.returncode == 2 and len(lines) == 1 and lines[0].startswith("error:"), lines
    assert all(part in lines[0] for part in says), lines
