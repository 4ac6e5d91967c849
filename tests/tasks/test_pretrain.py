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

from adalora_dist.config.methods import ReloraConfig
from adalora_dist.io.errors import UserError
from adalora_dist.io.publish import scratch_folder
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
        by_tokens = again.parts(123_456, world_size, 1, 32 * again.longest)
        assert len(by_tokens) == sum(map(len, parts)) and max(map(len, by_tokens)) <= 32
        assert sorted(row for rows in by_tokens for row in rows) == sorted(whole)
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
    (tmp_path / "moved").mkdir()
    for name in ("a.jsonl", "b.txt.gz"):
        (tmp_path / "moved" / name).write_bytes((tmp_path / name).read_bytes())
    elsewhere = tuple(str(tmp_path / "moved" / name) for name in ("a.jsonl", "b.txt.gz"))
    moved, _ = store(data.model_copy(update={"source": elsewhere, "max_eval_tokens": 300}))
    assert moved.content == made.content and len(moved.held_out) < len(made.held_out)  # a run may go on with it
    again, _ = store(data)  # mapped, not made
    assert again.train[3] == made.train[3] and again.content == made.content
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2
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
    [left] = (tmp_path / "other").glob(".building.*")
    with scratch_folder(tmp_path / "other") as of_another:  # which is at work
        assert not left.exists() and of_another.is_dir()
        left.mkdir()
        store(data.model_copy(update={"max_length": 32}))  # whichever store it is
        assert not left.exists() and of_another.is_dir()
    again, _ = store(data)
    assert not [*(tmp_path / "other").glob(".building.*")]
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
        (tmp_path / "tiny.txt").write_text("x" * 39)
        store(PretrainDataConfig(source=(str(tmp_path / "long.txt"),), eval_split=str(tmp_path / "a.txt")))
    with pytest.raises(UserError, match="40 tokens to train on, .* give more text, or a smaller --max-length"):
        store(PretrainDataConfig(source=(str(tmp_path / "tiny.txt"),), eval_split=str(tmp_path / "long.txt")))
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


def test_plain_text_is_unicode_and_whole(tmp_path: Path) -> None:
    """Long lines are cut between characters; what is no UTF-8, or ends in the middle, is refused by its place."""

    def read(name: str, content: bytes) -> list[str]:
        (tmp_path / name).write_bytes(content)
        source, _ = sources_of(PretrainDataConfig(source=(str(tmp_path / name),)))
        return list(documents(source, "text", BadRows("error")))

    for word in ("é", "дом", "漢字", "a🙂"):
        text = word * 100_000
        found = read("long.txt", b"\xef\xbb\xbf" + text.encode())
        assert "".join(found) == text and len(found) > 1
    with pytest.raises(UserError, match=r"bad.txt:4: not UTF-8 text .*; save it as UTF-8"):
        read("bad.txt", b"good\nlines\n\nbad \xff line\n\ngood\n")
    with pytest.raises(UserError, match=r"cut.txt.gz cannot be read .*: bring it back"):
        read("cut.txt.gz", gzip.compress(os.urandom(3000).hex().encode())[:-500])


MEASURED = """
import resource, sys
from pathlib import Path
from adalora_dist.tasks.pretrain import store as store_file
from tests.tasks.test_pretrain import PretrainDataConfig, store

def peak():  # of this process alone: getrusage also counts what it was forked from
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

store_file._CHUNK_CHARACTERS = 1 << 15
small, large = (PretrainDataConfig(source=(path,), eval_share=0.01, max_eval_tokens=10_000) for path in sys.argv[1:])
store(small)
before = peak()
made, _ = store(large)
print(len(made.train) * made.train.length, peak() - before)
"""


@pytest.mark.slow
def test_the_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """48 MB of different documents, in rows and in plain text; any copy of it in memory would be 48 MB and more."""
    if not Path("/proc/self/status").exists():
        pytest.skip("measured by /proc")
    num_bytes = 48 << 20
    for suffix in ("jsonl", "txt"):
        paths = [tmp_path / f"{size}.{suffix}" for size in ("small", "large")]
        for path, wanted in zip(paths, (1 << 20, num_bytes), strict=True):
            with path.open("w") as file:
                number = 0
                while file.tell() < wanted:
                    text = f"document {number}: " + "words of a text that goes on for a while " * 100
                    file.write(json.dumps({"text": text}) + "\n" if suffix == "jsonl" else text + "\n\n")
                    number += 1
        words = [sys.executable, "-c", MEASURED, *map(str, paths)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        num_tokens, growth = map(int, done.stdout.split())
        assert num_tokens > 0.95 * num_bytes  # of bytes, and of nearly all of them
        # The pages of train.bin that are mapped are not read here; what is left are buffers.
        assert growth < num_bytes // 3, growth


# ------------------------------------------------------------------------------------------------------- configuration


def test_what_the_schema_refuses() -> None:
    with pytest.raises(UserError, match="method relora with no train_modules and no model: embeddings"):
        PretrainConfig(adapter=ReloraConfig())
    with pytest.raises(UserError, match="data c4 without num_tokens or max_steps"):
        PretrainConfig(data=PretrainDataConfig(source=("c4",)))
    with pytest.raises(UserError, match="max_eval_tokens 100 is not one sequence of max_length 256; raise it"):
        PretrainDataConfig(max_eval_tokens=100)
    with pytest.raises(UserError, match="c4 is read by itself"):
        PretrainDataConfig(source=("c4", "a.txt"))
    config = PretrainConfig(train=PretrainTrainConfig(num_tokens=10**9, batch_size=512))
    assert config.with_steps().train.max_steps == -(-(10**9) // (512 * 256))
