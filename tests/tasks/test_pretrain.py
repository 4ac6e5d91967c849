"""Text for pre-training: read as a stream, tokenised once, cut into windows that any number of processes finds."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from adalora_dist.config.methods import ReloraConfig
from adalora_dist.io.errors import UserError
from adalora_dist.tasks.pretrain import store as store_file
from adalora_dist.tasks.pretrain.config import PretrainConfig, PretrainDataConfig, PretrainTrainConfig
from adalora_dist.tasks.pretrain.demo import demo_stories
from adalora_dist.tasks.pretrain.documents import documents, sources_of
from adalora_dist.tasks.pretrain.plan import WindowPlan, permuted
from adalora_dist.tasks.pretrain.store import TokenStore, token_store
from adalora_dist.tasks.rows.bad_rows import BadRows
from tests.support.paths import ROOT
from tests.support.tiny_language_model import byte_tokenizer


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ADALORA_DIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def store(data: PretrainDataConfig, policy: str = "error") -> tuple[TokenStore, BadRows]:
    bad = BadRows(policy)
    return token_store(data, byte_tokenizer(bos=False), bad, show=False), bad


# ----------------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000])
def test_every_place_is_taken_once(count: int) -> None:
    orders = [[permuted(k, count, f"{seed} 0".encode()) for k in range(count)] for seed in (1, 2)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert count < 10 or (orders[0] != orders[1] and orders[0] != list(range(count)))


def test_a_plan_is_the_same_on_any_number_of_processes_and_needs_no_memory() -> None:
    plan = WindowPlan(10**12, 256, 512, 3, "text")
    assert plan.num_target_tokens(7) == 512 * 255 and plan.num_steps(1) == 10**12 // 512
    assert sum(plan.lengths[row] for row in plan.batch(7)) == 512 * 256
    whole = plan.batch(123_456)
    for world_size in (1, 2, 3, 8):
        again = WindowPlan(10**12, 256, 512, 3, "text")  # of a run that goes on there
        parts = [again.micro_batches(123_456, rank, world_size, 32) for rank in range(world_size)]
        assert sorted(row for part in parts for rows in part for row in rows) == sorted(whole)
        assert again.fingerprint() == plan.fingerprint()
    others = [WindowPlan(10**12, 256, 512, 3, "other"), WindowPlan(10**12, 128, 512, 3, "text")]
    assert plan.fingerprint() not in [other.fingerprint() for other in others]
    small = WindowPlan(10, 8, 4, 0, "")
    epochs = [sorted(row for step in (2 * e, 2 * e + 1) for row in small.batch(step)) for e in range(4)]
    assert all(len(set(rows)) == 8 for rows in epochs) and len({*map(tuple, epochs)}) > 1


# ----------------------------------------------------------------------------------------------------------- the store


def test_windows_are_the_documents_one_after_the_other(tmp_path: Path, cache: Path) -> None:
    texts = [f"document {k} " + "abc " * (k % 7) for k in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"content": t}) + "\n" for t in texts[:120]))
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("\n\n".join(text.strip() for text in texts[120:]))
    data = PretrainDataConfig(
        source=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt.gz")), column="content", eval_share=0.2, max_length=32
    )
    made, _ = store(data)
    tokenizer = byte_tokenizer(bos=False)
    found = {}
    for side in (made.train, made.held_out):
        tokens = [token for row in side[:] for token in row["input_ids"]]
        assert len(tokens) == 32 * len(side) and all(row["labels"] == row["input_ids"] for row in side[:3])
        for text in tokenizer.decode(tokens).split("</s>")[:-1]:
            assert found.setdefault(text, side) is side and text.strip() in {t.strip() for t in texts}
    assert len(found) > 180 and 20 < sum(side is made.held_out for side in found.values()) < 60
    again, _ = store(data)  # mapped, not made
    assert again.train[3] == made.train[3] and again.content == made.content
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
    (tmp_path / "a.jsonl").write_text(json.dumps({"content": "changed"}) * 1)
    assert store(data.model_copy(update={"eval_share": 0.5}))[0].content != made.content


def test_a_killed_tokenisation_leaves_nothing_and_the_next_gives_the_same(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{number} {story}" for number, story in enumerate(demo_stories(60))]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    data = PretrainDataConfig(source=(str(tmp_path / "a.txt"),), max_length=64, eval_share=0.1)
    monkeypatch.setattr(store_file, "_CHUNK_CHARACTERS", 4000)
    expected, _ = store(data)
    monkeypatch.setenv("ADALORA_DIST_CACHE", str(tmp_path / "other"))
    if (child := os.fork()) == 0:
        made = store_file._chunks

        def dying(texts: Iterable[str]) -> Iterator[list[str]]:
            for number, chunk in enumerate(made(texts)):
                if number == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield chunk

        store_file._chunks = dying
        store(data)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not [path for path in (tmp_path / "other").glob("pretrain-*") if path.is_dir()]
    again, _ = store(data)
    assert len(again.train) > 300 and again.train[:] == expected.train[:] and again.held_out[:] == expected.held_out[:]


def test_rows_without_a_text_are_refused_or_counted(tmp_path: Path) -> None:
    rows = [{"text": f"line {k} of a text"} for k in range(40)]
    lines = [json.dumps(row) for row in rows] + ['{"text": ""}', '{"other": 3}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = PretrainDataConfig(source=(str(tmp_path),), eval_share=0.3, max_length=16)
    with pytest.raises(UserError, match=r"a.jsonl:41: field text is ''"):
        store(data)
    for _ in range(2):  # also from the cache
        assert store(data, "skip")[1].counts == {str(tmp_path / "a.jsonl"): 2}


def test_too_little_text_and_wrong_paths_get_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(UserError, match="tokens to validate on, not one sequence of max_length=256"):
        (tmp_path / "long.txt").write_text("word " * 400)
        store(PretrainDataConfig(source=(str(tmp_path / "long.txt"),), eval_split=str(tmp_path / "a.txt")))
    (tmp_path / "b.pdf").write_text("")
    for word, message in (("missing", "no such file or folder"), ("b.pdf", "its name must end in one of .jsonl")):
        with pytest.raises(UserError, match=message):
            sources_of(PretrainDataConfig(source=(str(tmp_path / word),)))


def test_plain_text_is_cut_at_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\n  \nthree\n" + "x" * 200_000)
    source, _ = sources_of(PretrainDataConfig(source=(str(tmp_path / "a.txt"),)))
    found = list(documents(source, "text", BadRows("error")))
    assert found[0] == "one\ntwo" and found[1].startswith("three\nxxx") and "".join(found).count("x") == 200_000
    assert max(map(len, found)) < 1 << 18


@pytest.mark.slow
def test_the_memory_of_two_gigabytes_of_text(tmp_path: Path) -> None:
    line = json.dumps({"text": "the words of a document that is long enough to be one " * 20}) + "\n"
    with (tmp_path / "big.jsonl").open("w") as file:
        for _ in range(2_000_000_000 // len(line) // 1000):
            file.write(line * 1000)
    code = (
        "import resource, sys; sys.path.insert(0, '.');"
        "from tests.tasks.test_pretrain import store, PretrainDataConfig;"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        f"made, _ = store(PretrainDataConfig(source=({str(tmp_path / 'big.jsonl')!r},), eval_share=0.9999, "
        "max_eval_tokens=100000000));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "not one sequence" in done.stderr or int(done.stdout) < 300_000, done.stderr


# ------------------------------------------------------------------------------------------------------- configuration


def test_what_the_schema_refuses() -> None:
    with pytest.raises(ValidationError, match="method relora with no train_modules and no model: embeddings"):
        PretrainConfig(adapter=ReloraConfig())
    with pytest.raises(ValidationError, match="data c4 without num_tokens or max_steps"):
        PretrainConfig(data=PretrainDataConfig(source=("c4",)))
    with pytest.raises(ValidationError, match="c4 is read by itself"):
        PretrainDataConfig(source=("c4", "a.txt"))
    config = PretrainConfig(train=PretrainTrainConfig(num_tokens=10**9, batch_size=512))
    assert config.with_steps().train.max_steps == -(-(10**9) // (512 * 256))
