"""Every file that is read x everything that may lie in its place: one line or a clean way round, of few bytes.

A child process with limited memory reads each, and counts the bytes that it has read; what hangs, fills memory,
computes or reads on without end fails there.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adalora_dist.artifacts.checkpoints.files import Damaged, verify
from adalora_dist.artifacts.export import read_adapter, save_adapter
from adalora_dist.artifacts.hub.files import check_export
from adalora_dist.artifacts.hub.pictures import read_history
from adalora_dist.backbones.dequantized import read_quantization_record
from adalora_dist.backbones.files import refuse_odd_files, stored_tensors, weight_files
from adalora_dist.backbones.load import load_backbone
from adalora_dist.config.flags import fail
from adalora_dist.config.sections import ModelConfig, TrainConfig
from adalora_dist.io.errors import UserError, printable
from adalora_dist.io.foreign_files import NotReadable, read_object, read_records, read_sections, read_text
from adalora_dist.io.launchers import RESTARTS
from adalora_dist.io.yaml_file import read_yaml
from adalora_dist.methods.adalora.start import read_peft
from adalora_dist.methods.update import AdapterWeights
from adalora_dist.tasks.rows import token_cache
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.files import find_split
from adalora_dist.tasks.rows.read import file_rows
from adalora_dist.tasks.rows.table import checked_table
from adalora_dist.tasks.sft.template import set_template
from adalora_dist.training.faults.run_lock import RunLock
from adalora_dist.training.launch import zero_stage
from adalora_dist.training.restarts import count_restart
from adalora_dist.training.resume import backbone_identity
from tests.support.checkpoint_faults import Run
from tests.support.limits import HANG_SECONDS
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama

MEMORY_BYTES = READ_BYTES = 500 << 20
BUSY_SECONDS = 60
"""Of the processor: ten times what a slow one needs for the longest."""
SPARSE_BYTES = 100 << 30


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(SPARSE_BYTES)


def sparse_end(path: Path) -> None:
    """The right beginning, and then 100 GB of nothing."""
    os.truncate(path, SPARSE_BYTES)


def text(content: str | bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content) and None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


INSTEAD: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "folder": lambda path: path.mkdir(),
    "sparse": sparse,
    "empty": text(""),
    "list": text("[1, 2]"),
    "text": text('"x"'),
    "deep": text("[" * 100_000),
    "deep object": text('{"a": ' * 50_000),
    "huge number": text('{"a": ' + "9" * 5000 + "}"),
    "NaN": text('{"format": NaN, "step": Infinity, "weight_map": NaN, "r": NaN}'),
    "wrong types": text('{"format": [], "weight_map": 7, "zero_optimization": 3, "host": [], "files": "x"}'),
    "control characters": text('{"\\u001b[2J\\u202e": "\\u0007\\u009b31m"}'),
    "raw controls": text(b"\x1b[2J\x9b\x00\x07" * 20),
}
DAMAGE: dict[str, Callable[[Path], Any]] = {"cut": cut, "flipped": flipped, "sparse end": sparse_end}
KINDS = {**INSTEAD, **DAMAGE}


# ---------------------------------------------------------------------------------------------- what reads which file

Place = tuple[Path, Callable[[], Any]]
"""The file, and what reads it."""


def prepare_run(folder: Path) -> None:
    model = tiny_llama(260)
    model.save_pretrained(folder / "base", max_shard_size="20KB")
    byte_tokenizer().save_pretrained(folder / "base")
    d_out, d_in = model.get_submodule("model.layers.0.self_attn.q_proj").weight.shape
    matrices = [
        AdapterWeights(
            "model.layers.0.self_attn.q_proj", torch.ones(d_out, 2), torch.ones(2), torch.ones(2, d_in), 0.5, False
        )
    ]
    task = {"architectures": ["LlamaForCausalLM"]}
    save_adapter(matrices, folder / "adapter", "a/b", None, {"lm_head.weight": torch.ones(2, 2)}, task)
    from adalora_dist.artifacts.peft_format import save_lora

    save_lora(matrices, folder / "lora", str(folder / "base"))
    Run(folder / "checkpoints").save(10)


def checkpoint(folder: Path) -> None:
    try:
        verify(folder / "checkpoints" / "step-00000010")
    except Damaged as damage:
        raise UserError(str(damage)) from None


def whole_base(folder: Path) -> None:
    refuse_odd_files(folder / "base")
    stored_tensors(weight_files(folder / "base"))


def one_table(folder: Path) -> None:
    bad = BadRows("skip")
    checked_table(find_split(folder, ("train",)), ("a",), lambda row, origin: {"a": str(row)}, bad)


def lock(folder: Path) -> None:
    RunLock(folder / "locked").release()


def restart(folder: Path) -> None:
    os.environ[RESTARTS] = "1"  # of the process that reads
    count_restart(TrainConfig(output_dir=str(folder / "restarted")), 5)


def all_rows(path: Path) -> None:
    for _, row in file_rows(path):
        if isinstance(row, UserError):
            printable(row)


SHARD = "checkpoints/step-00000010/shard-00000-of-00001.safetensors"
READERS: dict[str, Callable[[Path], Any]] = {
    "adapter/adapter.json": lambda folder: read_adapter(folder / "adapter"),
    "adapter/task.json": lambda folder: read_adapter(folder / "adapter"),
    "adapter/adapter.safetensors": lambda folder: read_adapter(folder / "adapter"),
    "adapter/trained.safetensors": lambda folder: read_adapter(folder / "adapter"),
    "lora/adapter_config.json": lambda folder: read_peft(folder / "lora", 1.0),
    "lora/adapter_model.safetensors": lambda folder: read_peft(folder / "lora", 1.0),
    "base/config.json": whole_base,
    "base/tokenizer.json": lambda folder: check_export(folder / "base", None),
    "base/tokenizer_config.json": lambda folder: check_export(folder / "base", None),
    "base/generation_config.json": lambda folder: check_export(folder / "base", None),
    "base/model.safetensors.index.json": whole_base,
    "base/model-00001-of-00006.safetensors": whole_base,
    "base/vocab.txt": whole_base,
    "base/LICENSE": lambda folder: check_export(folder / "base", None),
    "checkpoints/step-00000010/manifest.json": checkpoint,
    "checkpoints/step-00000010/state.json": checkpoint,
    SHARD: checkpoint,
    "config.yaml": lambda folder: read_sections(folder / "config.yaml"),
    "run.yaml": lambda folder: read_yaml(folder / "run.yaml"),
    "run.json": lambda folder: read_object(folder / "run.json"),
    "metrics.jsonl": lambda folder: read_records(folder / "metrics.jsonl"),
    "allocations.jsonl": lambda folder: read_history(folder / "allocations.jsonl"),
    "quantized.json": lambda folder: read_quantization_record(folder / "quantized.json"),
    "ds.json": lambda folder: zero_stage(folder / "ds.json"),
    "words.txt": lambda folder: read_text(folder / "words.txt"),
    "locked/.lock-owner": lock,
    "restarted/.restarts": restart,
    "train.jsonl": lambda folder: all_rows(folder / "train.jsonl"),
    "train.json": lambda folder: all_rows(folder / "train.json"),
    "train.jsonl.gz": lambda folder: all_rows(folder / "train.jsonl.gz"),
    "train.parquet": lambda folder: all_rows(folder / "train.parquet"),
    "table/train.jsonl": lambda folder: one_table(folder / "table"),
    "backbone/config.json": lambda folder: backbone_identity(ModelConfig(name=str(folder / "backbone"))),
    "template.jinja": lambda folder: set_template(byte_tokenizer(), str(folder / "template.jinja")),
    "cached.npz": lambda folder: token_cache._read(folder / "cached.npz"),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    prepare_run(folder)
    for name in READERS:
        if not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text('{"a": "one"}\n{"a": "two"}\n')
    token_cache._write(folder / "cached.npz", {"input_ids": [[1, 2], [3]]})
    return folder


def bytes_read() -> int:
    """By this process until now, from anything."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def ending(action: Callable[[], Any], told: Path) -> str:
    """What it comes to in a process of its own with limits: "read", or "refused" and the line, where it is well."""
    if not (number := os.fork()):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(HANG_SECONDS))
        with open("/proc/self/statm") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CPU, (BUSY_SECONDS,) * 2)
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES,) * 2)
        before = bytes_read()
        try:
            action()
            outcome = "read"
        except (UserError, NotReadable) as error:
            outcome = f"refused {error}"
        except BaseException as error:
            outcome = f"{type(error).__name__} {error!r:.300}"
        if (num_bytes := bytes_read() - before) > READ_BYTES:
            outcome = f"{num_bytes:,} bytes read, and {outcome}"
        told.write_text(outcome)
        os._exit(0)
    _, status = os.waitpid(number, 0)
    return told.read_text() if os.WIFEXITED(status) else f"ended by signal {os.WTERMSIG(status)}"


@pytest.mark.parametrize("name", READERS)
def test_whatever_lies_there(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A test for each file, with all kinds."""
    torch.set_num_threads(1)
    monkeypatch.setenv("ADALORA_DIST_CACHE", str(tmp_path / "cache"))
    outcomes = {}
    for kind, put in KINDS.items():
        folder = tmp_path / kind
        shutil.copytree(project, folder, copy_function=os.link)  # links, but none is written through
        path = folder / name
        content = path.read_bytes()
        path.unlink()
        if kind in DAMAGE:
            path.write_bytes(content)
        put(path)
        outcome = outcomes[kind] = ending(lambda folder=folder: READERS[name](folder), tmp_path / "told")
        assert outcome == "read" or outcome.startswith("refused "), (name, kind, outcome)
        assert "\n" not in outcome and len(outcome) < 1000, (name, kind, outcome)
        if path.is_file() and not path.is_symlink():
            os.truncate(path, 0)  # the disk of these tests
    for kind in ("pipe", "device", "terminal", "folder"):
        assert outcomes[kind] != "read" or name in MAY_BE_WITHOUT, (name, kind)


MAY_BE_WITHOUT = {
    "adapter/task.json", "adapter/trained.safetensors", "locked/.lock-owner", "restarted/.restarts",
    "backbone/config.json",
    "base/LICENSE", "base/tokenizer.json", "base/tokenizer_config.json", "base/generation_config.json",
}  # fmt: skip
"""What is passed over where it is no file."""


def test_there_are_enough_cases() -> None:
    assert len(READERS) * len(KINDS) >= 300


# --------------------------------------------------------------------------------------------- models, tables, caches


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse", "folder"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "vocab.txt"])
def test_a_model_is_looked_at_before_transformers_waits_for_it(
    project: Path, tmp_path: Path, name: str, kind: str
) -> None:
    shutil.copytree(project / "base", tmp_path / "base")
    (tmp_path / "base" / name).unlink()
    INSTEAD[kind](tmp_path / "base" / name)
    outcome = ending(lambda: load_backbone(ModelConfig(name=str(tmp_path / "base")), None), tmp_path / "told")
    assert outcome.startswith("refused ") and name in outcome


def test_every_flipped_bit_of_the_token_cache_is_found(tmp_path: Path) -> None:
    columns = {"input_ids": [[1, 2, 3], [4]], "labels": [[-100, 2, 3], [4]]}
    path = tmp_path / "cached.npz"
    token_cache._write(path, columns)
    content = path.read_bytes()
    assert token_cache._read(path) == columns
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(NotReadable):
            token_cache._read(path)
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(NotReadable):
            token_cache._read(path)


def test_a_bad_entry_of_the_token_cache_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADALORA_DIST_CACHE", str(tmp_path))
    made = []

    def encode(items: Any) -> dict[str, list[list[int]]]:
        made.append(len(items))
        return {"input_ids": [[item, item] for item in items]}

    def columns() -> dict[str, list[list[int]]]:
        return token_cache.cached_columns([1, 2, 3], byte_tokenizer(), {}, encode, "tokens", show_progress=False)

    first = columns()
    [path] = (tmp_path / "tokens").iterdir()
    for kind in ("empty", "flipped", "cut", "sparse", "pipe", "device", "raw controls"):
        if kind in INSTEAD:
            path.unlink()
        KINDS[kind](path)
        made.clear()
        assert columns() == first and made == [3], kind
        assert columns() == first and made == [3], kind
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_table_of_which_a_disk_has_changed_a_bit_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADALORA_DIST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"a": "one"}\n{"a": "two"}\n7\n')

    def rows() -> tuple[list[str], int]:
        bad = BadRows("skip")

        def parse(row: Any, origin: str) -> dict[str, str]:
            if not isinstance(row, dict):
                raise UserError(f"{origin}: no object")
            return {"a": row["a"]}

        table = checked_table(find_split(tmp_path / "data", ("train",)), ("a",), parse, bad)
        return list(table["a"]), bad.counts.total()

    assert rows() == (["one", "two"], 1)
    [arrow] = (tmp_path / "cache" / "rows").glob("*.arrow")
    for path in (arrow, arrow.with_suffix(".json")):
        for kind in ("flipped", "cut", "empty", "list", "pipe"):
            if kind in INSTEAD:
                path.unlink()
            KINDS[kind](path)
            assert rows() == (["one", "two"], 1), (path, kind)


def gzipped(path: Path, start: bytes, block: bytes, num_blocks: int) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(start)
        for _ in range(num_blocks):
            file.write(block)


MUCH_OF_LITTLE: dict[str, tuple[str, Callable[[Path], Any], Callable[[Path], Any]]] = {
    "object": ("a.json", text('{"a": [' + "{}," * 3_000_000 + "1]}"), read_object),
    "record": ("a.jsonl", text('{"a": [' + '"",' * 3_000_000 + "1]}\n"), read_records),
    "rows": ("a.jsonl", text('{"a": [' + "{}," * 3_000_000 + "1]}\n"), all_rows),
    "a cell without end": ("a.csv.gz", lambda path: gzipped(path, b'a,b\n"', b"x" * (1 << 20), 80), all_rows),
    "a row without end": ("a.csv.gz", lambda path: gzipped(path, b"a,b\n", b'"\n",' * (1 << 18), 20), all_rows),
}


@pytest.mark.parametrize("what", MUCH_OF_LITTLE)
def test_text_that_is_far_more_in_memory(tmp_path: Path, what: str) -> None:
    name, write, read = MUCH_OF_LITTLE[what]
    write(tmp_path / name)
    outcome = ending(lambda: read(tmp_path / name), tmp_path / "told")
    (tmp_path / name).unlink()
    # Of a row, the error is one.
    assert outcome == "read" if what == "rows" else outcome.startswith("refused "), outcome


# --------------------------------------------------------------------------------------------------- YAML and terminals


@pytest.mark.parametrize("num_levels", [5, 9, 200])
def test_aliases_that_make_much_of_little(tmp_path: Path, num_levels: int) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, num_levels)]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    outcome = ending(lambda: read_yaml(tmp_path / "run.yaml"), tmp_path / "told")
    assert outcome.startswith("refused ") and "aliases" in outcome and len(outcome) < 300


@pytest.mark.parametrize("content", ["a: &a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}"])
def test_aliases_in_themselves(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    outcome = ending(lambda: read_yaml(tmp_path / "run.yaml"), tmp_path / "told")
    assert outcome.startswith("refused ") and "alias" in outcome


def test_honest_aliases(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train: &t {seed: 1}\nother: *t\nmerged: {<<: *t, b: 2}\n")
    content, lines = read_yaml(tmp_path / "run.yaml")
    assert content == {"train": {"seed": 1}, "other": {"seed": 1}, "merged": {"seed": 1, "b": 2}}
    assert lines[("train", "seed")] == 1


@pytest.mark.parametrize("text", ["\x1b[2J", "\x9b31m", "a\x07b", "\u202eevil", "\x00", "\u2028", "\ud800", "\x7f"])
def test_terminals_see_no_controls(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(f"a{text}b").isprintable()
    with pytest.raises(SystemExit):
        fail(f"adapter.json: {text}")
    shown = capsys.readouterr().err
    assert shown.endswith("\n") and shown[:-1].isprintable() and shown.startswith("error: adapter.json:")


def test_printable_leaves_words_alone() -> None:
    assert printable("größe: 3 × 4 → «12» 日本") == "größe: 3 × 4 → «12» 日本"
    assert printable("a\nb\tc") == "a b c" and printable("x" * 300) == "x" * 197 + "..."


def test_digests_are_those_of_files(tmp_path: Path) -> None:
    token_cache._write(tmp_path / "a.npz", {"a": [[1]]})
    content = (tmp_path / "a.npz").read_bytes()
    assert content[:32] == hashlib.sha256(content[32:]).digest()
    (tmp_path / "plain.npz").write_bytes(content[32:])
    assert np.load(tmp_path / "plain.npz")["a.values"].tolist() == [1]
