"""What somebody else may have written into a folder: every file of it that is read ends in one line, or is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adalora_dist.__main__ import main
from adalora_dist.artifacts.export import merge, read_adapter, save_adapter
from adalora_dist.artifacts.peft_format import save_lora
from adalora_dist.backbones.dequantized import read_quantization_record
from adalora_dist.io import foreign_files
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import MAX_BYTES, read_object, read_records, read_sections
from adalora_dist.io.yaml_file import read_yaml
from adalora_dist.methods.update import AdapterWeights
from adalora_dist.tasks.rows.read import file_rows
from tests.support.local_hub import TOKEN, write_run
from tests.support.refusals import refusal
from tests.support.tiny_language_model import tiny_llama

MATRIX = "model.layers.0.self_attn.q_proj"
NO_OBJECTS = {
    "empty": b"",
    "list": b"[]",
    "list of objects": b'[{"a": 1}]',
    "text": b'"x"',
    "number": b"7",
    "null": b"null",
    "not JSON": b"{",
    "not UTF-8": b'{"a": "\xff"}',
    "half a character": b'{"a": "\\ud800"}',
    "half a character in a name": b'{"\\udfff": 1}',
    "number without end": b'{"a": ' + b"9" * 5000 + b"}",
    "brackets without end": b"[" * 200_000,
    "deep list": b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "deep object": b'{"a": ' * 50_000 + b"1" + b"}" * 50_000,
    "deeper than can be written again": b'{"a": ' * 300 + b"1" + b"}" * 300,
}
no_objects = pytest.mark.parametrize("content", NO_OBJECTS.values(), ids=NO_OBJECTS)


# ------------------------------------------------------------------------------------------------------ the readers


@no_objects
def test_what_is_no_object(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    message = refusal(read_object, path)
    assert message.startswith(f"{path} cannot be read (") and len(message) < 200 + len(str(path))
    records = tmp_path / "a.jsonl"
    records.write_bytes(b'{"a": 1}\n' + content + b"\n")
    assert refusal(read_records, records).startswith(f"{records}:2 cannot be read (")


def test_what_is_an_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in ({}, {"a": [1, {"b": None}], "\U0001f600": "\u202e"}, {"escaped": "\ud83d\ude00"}):
        path.write_text(json.dumps(content))
        assert read_object(path) == json.loads(path.read_text())
    path.write_text('{"a": ' * 32 + "1" + "}" * 32)
    assert read_object(path)
    path.write_text('{"a": ' * 33 + "1" + "}" * 33)
    assert "nested deeper than 32" in refusal(read_object, path)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")  # and this one would not end
    for name in ("pipe", "folder", "zero"):
        for read in (read_object, read_records, read_sections):
            assert "no plain file" in refusal(read, tmp_path / name)
    assert "No such file" in refusal(read_object, tmp_path / "nowhere")
    assert "No such file" in refusal(read_sections, tmp_path / "nowhere")
    assert read_records(tmp_path / "nowhere") == []


def test_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    assert "more than 67,108,864 bytes" in refusal(read_object, large)
    assert "more than 67,108,864 bytes" in refusal(read_records, large)
    assert "more than 1,048,576 bytes" in refusal(read_sections, large)
    monkeypatch.setattr(foreign_files, "MAX_BYTES", 20)
    small = tmp_path / "small.jsonl"
    small.write_text('{"a": 12345678901}\n' * 1000)  # 19 bytes each: the limit is one of lines
    assert len(read_records(small)) == 1000


def test_a_last_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_records(path) == [{"step": 1}, {"step": 2}]


ODD_TAGS = (
    'a: !!int ""', 'a: !!float ""', "a: !!bool maybe", "a: !!timestamp abc", "a: !!set [1]", "a: !!omap [x]",
    "a: !!binary x", "a: 0x" + "f" * 4000, "a: 1" + ":59" * 3000, "a: 1" + ":59" * 3000 + ".5",
)  # fmt: skip


@pytest.mark.parametrize("content", ODD_TAGS)
def test_a_value_that_is_not_what_it_is_said_to_be(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    message = refusal(read_yaml, tmp_path / "run.yaml")
    assert "not valid YAML (" in message and len(message) < 300


@pytest.mark.parametrize(
    "content",
    [
        "", "a", "- a", "7", "{", "a: b: c", "a: !!python/object/apply:os.system [ls]", "a: 2001-99-99", "[" * 5000,
        "a: " + "[" * 40 + "]" * 40, "a: &a [x, x]\nb: &b [*a, *a]\n", "a: &a {b: *a}", "a: !!set {? [1]}",
        *ODD_TAGS,
    ],
)  # fmt: skip
def test_what_is_no_configuration(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    message = refusal(read_sections, tmp_path / "config.yaml")
    assert message.startswith(f"{tmp_path}/config.yaml cannot be read (") and len(message) < 300


def test_what_is_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {name: a/b}\nother: 3\n7: {}\n")
    assert read_sections(tmp_path / "config.yaml") == {"model": {"name": "a/b"}}


# ------------------------------------------------------------------------------------- every file of a run's folders


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    tiny_llama(8).save_pretrained(folder / "base", max_shard_size="20KB")
    run = write_run(folder / "run")
    d_out, d_in = tiny_llama(8).get_submodule(MATRIX).weight.shape
    adapters = [AdapterWeights(MATRIX, torch.ones(d_out, 2), torch.ones(2), torch.ones(2, d_in), 0.5, False)]
    save_adapter(adapters, run / "adapter", str(folder / "base"), None)
    (run / "adapter" / "task.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    save_lora(adapters, run / "lora", str(folder / "base"))
    (run / "rank_pattern.json").write_text(json.dumps({MATRIX: 2}))
    return folder


def told(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


COMMANDS = {
    "inspect": (
        *("run/adapter/adapter.json", "run/adapter/task.json", "run/run.json", "run/config.yaml"),
        *("run/allocations.jsonl", "run/lora/adapter_config.json"),
    ),
    "export": (
        *("run/adapter/adapter.json", "run/adapter/task.json", "run/run.json", "run/config.yaml"),
        *("base/config.json", "base/model.safetensors.index.json"),
    ),
    "push": (
        *("run/run.json", "run/config.yaml", "run/rank_pattern.json", "run/results.json", "run/verification.json"),
        *("run/metrics.jsonl", "run/merged/config.json", "run/merged/generation_config.json"),
        *("run/merged/tokenizer_config.json", "run/merged/model.safetensors.index.json"),
    ),
}


@pytest.mark.parametrize(
    "content", [NO_OBJECTS[kind] for kind in ("list", "not JSON", "half a character", "deep list")]
)
@pytest.mark.parametrize(("command", "name"), [(c, name) for c, names in COMMANDS.items() for name in names])
def test_files_of_a_run(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    command: str, name: str, content: bytes,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("adalora_dist.artifacts.hub.push.HfApi", None)  # it must not come so far
    monkeypatch.setattr("adalora_dist.artifacts.hub.push.card_pictures", lambda run: {})
    for folder in ("run", "base"):
        shutil.copytree(project / folder, tmp_path / folder)
    (tmp_path / name).write_bytes(content + b"\n")
    run, out = tmp_path / "run", tmp_path / "out"
    words = {
        "inspect": ("inspect", run, "--pictures", "none"),
        "export": ("export", run, "--to", "merged", "--dtype", "bfloat16", "--base", tmp_path / "base", "--out", out),
        "push": ("push", run, "somebody/a-model"),
    }
    line = told(capsys, *words[command])
    assert Path(name).name in line and len(line) < 600
    assert {path.name for path in tmp_path.iterdir()} == {"run", "base"}


@no_objects
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "quantized.json").write_bytes(content)
    assert "merge into original" in refusal(read_quantization_record, tmp_path / "quantized.json")
    (tmp_path / "train.jsonl").write_bytes(content)
    for _, row in file_rows(tmp_path / "train.jsonl"):  # an error is one of the rows
        assert not isinstance(row, UserError) or "\n" not in str(row)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": [2]}, {"format": None}, {"base_model": 7}, {"base_model": None}, {"base_revision": ["a"]},
        {"scales": []}, {"scales": {}}, {"scales": {MATRIX: "x"}}, {"scales": {MATRIX: 1e999}}, {"rank_pattern": 3},
        {"rank_pattern": {MATRIX: -1}}, {"rank_pattern": {MATRIX: 3}}, {"rank_pattern": {MATRIX: None}},
        {"rank_pattern": {"a\x1b[2J": 0}}, {"rank_pattern": {"a\nb": 0}}, {"shapes": {}}, {"shapes": {MATRIX: [8]}},
        {"shapes": {MATRIX: [0, 8]}}, {"shapes": {MATRIX: {"a": 8}}}, {"transposed": None}, {"transposed": {}},
    ],
    ids=str,
)  # fmt: skip
def test_what_an_adapter_says_of_itself(project: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    shutil.copytree(project / "run" / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))
    message = refusal(read_adapter, tmp_path / "adapter")
    assert "adapter.json" in message and "\x1b" not in message and len(message) < 400
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in changes}))
    assert "adapter.json" in refusal(read_adapter, tmp_path / "adapter")


@pytest.mark.parametrize(
    "task",
    [{"architectures": []}, {"architectures": "Llama"}, {"id2label": {}}, {"architectures": ["A"], "id2label": [1]}],
    ids=str,
)
def test_what_a_task_says(project: Path, tmp_path: Path, task: dict[str, Any]) -> None:
    shutil.copytree(project / "run" / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "task.json").write_text(json.dumps(task))
    assert "task.json" in refusal(read_adapter, tmp_path / "adapter")


def test_a_task_brings_no_code(project: Path, tmp_path: Path) -> None:
    """config.json of a merged model takes what it knows of a task, and not, say, whose Python to run."""
    shutil.copytree(project / "run" / "adapter", tmp_path / "adapter")
    task = {"architectures": ["LlamaForCausalLM"], "id2label": {"0": "no"}}
    (tmp_path / "adapter" / "task.json").write_text(json.dumps(task | {"auto_map": {"AutoModel": "evil--a.B"}}))
    assert read_adapter(tmp_path / "adapter").task == task


# ------------------------------------------------------------------------------------- what a base has besides itself


def merge_from(base: Path, out: Path) -> None:
    d_out, d_in = tiny_llama(8).get_submodule(MATRIX).weight.shape
    adapters = [AdapterWeights(MATRIX, torch.ones(d_out, 1), torch.ones(1), torch.ones(1, d_in), 0.5, False)]
    merge(adapters, base, out, show_progress=False)


@pytest.mark.parametrize("max_shard_size", ["20KB", "1GB"])
def test_indexes_of_other_weights_stay_behind(tmp_path: Path, max_shard_size: str) -> None:
    """Theirs are not copied, and a loader that follows one would find half a model."""
    model = tiny_llama(8)
    model.save_pretrained(tmp_path / "base", max_shard_size=max_shard_size)
    foreign = json.dumps({"weight_map": {"lm_head.weight": "model.fp16-00001-of-00002.safetensors"}})
    for name in (
        "model.safetensors.index.fp16.json",
        "model.fp16.safetensors.index.json",
        "pytorch_model.bin.index.json",
    ):
        (tmp_path / "base" / name).write_text(foreign)
    (tmp_path / "base" / "consolidated.safetensors.index.json").write_text(foreign)
    (tmp_path / "base" / "README.md").write_text("The card of the base, which is not that of what is merged into it.")
    (tmp_path / "base" / "LICENSE").write_text("Its terms, which are.")
    if max_shard_size == "1GB":  # left from a time when the model was in shards; transformers does not look at it
        (tmp_path / "base" / "model.safetensors.index.json").write_text(foreign)
    merge_from(tmp_path / "base", tmp_path / "merged")
    merged = tmp_path / "merged"
    indexes = {path.name for path in merged.iterdir() if ".index." in path.name}
    assert indexes == ({"model.safetensors.index.json"} if max_shard_size == "20KB" else set())
    assert (merged / "LICENSE").is_file() and not (merged / "README.md").exists()
    loaded, report = type(model).from_pretrained(merged, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = model.get_submodule(MATRIX).weight + 0.5
    torch.testing.assert_close(loaded.get_submodule(MATRIX).weight, expected)
    for name in indexes:
        assert {path.name for path in merged.glob("*.safetensors")} == set(
            json.loads((merged / name).read_text())["weight_map"].values()
        )


def test_a_single_file_goes_before_shards(tmp_path: Path) -> None:
    """As in transformers: what was trained on is what is merged into."""
    base = tmp_path / "base"
    tiny_llama(8).save_pretrained(base, max_shard_size="20KB")
    model = tiny_llama(8)
    with torch.no_grad():
        model.get_submodule(MATRIX).weight.fill_(3)
    model.save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / "model.safetensors", base)
    assert type(model).from_pretrained(base).get_submodule(MATRIX).weight.eq(3).all()
    merge_from(base, tmp_path / "merged")
    assert type(model).from_pretrained(tmp_path / "merged").get_submodule(MATRIX).weight.eq(3.5).all()
    assert [path.name for path in (tmp_path / "merged").glob("*.safetensors*")] == ["model.safetensors"]


def broken(action: Callable[[Path], Any], tmp_path: Path) -> str:
    base = tmp_path / "base"
    tiny_llama(8).save_pretrained(base, max_shard_size="20KB")
    action(base)
    message = refusal(merge_from, base, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
    return message


def test_bases_that_are_not_whole(tmp_path: Path) -> None:
    def first(base: Path) -> Path:
        return min(base.glob("*.safetensors"))

    cases: dict[str, Callable[[Path], Any]] = {
        "not a whole safetensors file": lambda base: first(base).unlink(),
        "is not a whole safetensors file": lambda base: first(base).write_bytes(first(base).read_bytes()[:-9]),
        "is an adapter": lambda base: (base / "adapter_config.json").write_text("{}"),
    }
    for number, (says, action) in enumerate(cases.items()):
        (tmp_path / str(number)).mkdir()
        assert says in broken(action, tmp_path / str(number))
