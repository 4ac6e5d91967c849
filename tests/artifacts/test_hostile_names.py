"""Names that try to lead somewhere else: refused in one line, before anything is written, sent or followed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adalora_dist.__main__ import main
from adalora_dist.artifacts.export import load_adapter, merge
from adalora_dist.artifacts.hub.files import check_export
from adalora_dist.artifacts.hub.pictures import draw_rank_map
from adalora_dist.artifacts.tables import rank_table
from adalora_dist.backbones.files import indexed_files, refuse_foreign_link, weight_files
from adalora_dist.config.flags import parse_config
from adalora_dist.config.hub_names import check_branch, check_repo_id
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.start import read_peft
from adalora_dist.methods.update import AdapterWeights
from adalora_dist.tasks.commonsense.config import CommonsenseConfig
from tests.support.local_hub import write_run
from tests.support.refusals import refusal
from tests.support.tiny_language_model import tiny_llama

HOSTILE = [
    "../outside",
    "../../outside",
    "..",
    ".",
    "/etc/passwd",
    "//server/share",
    "a/../../outside",
    "a/./b/..",
    "a/b/c",
    "a//b",
    "~/outside",
    "~root",
    "..\\..\\outside",
    "C:\\outside",
    "%2e%2e%2foutside",
    "https://elsewhere.example/a",
    "file:///etc/passwd",
    "a/b?x=y",
    "a/b#x",
    "a/b@main",
    "a/b\n",
    "a\nb/c",
    "a\x00b",
    "a\u202eb/c",
    "a\u2044b",
    "\uff0e\uff0e/outside",
    "$(touch outside)/a",
    "`touch outside`",
    "-rf/-a",
    ".git/config",
    "a/.git",
    "a/b.git",
    "a--b/c..d",
    " a/b",
    "a/" + "b" * 300,
]


def everything(folder: Path) -> dict[str, Any]:
    """Each file, folder and link below, with what it holds and when it changed."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (content, path.lstat().st_mtime_ns)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture()
def parent(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run two levels down, and around it files that a name could reach."""
    shutil.copytree(finished, tmp_path / "work" / "inner" / "run")
    for place in (tmp_path, tmp_path / "work", tmp_path / "work" / "inner", tmp_path / "work" / "inner" / "run"):
        save_file({"secret": torch.ones(3)}, place / "outside.safetensors")
    monkeypatch.chdir(tmp_path / "work" / "inner")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x1" * 17)
    monkeypatch.setattr(
        "adalora_dist.artifacts.hub.push.HfApi", None
    )  # nothing here may come so far as to talk to a Hub
    return tmp_path


def command_line(capsys: pytest.CaptureFixture[str], action: Callable[..., Any], *arguments: Any) -> str:
    """What a command that ends with a mistake says: one line."""
    with pytest.raises(SystemExit) as stopped:
        action(*arguments)
    assert stopped.value.code == 2
    [line] = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    return line


def test_there_are_enough_of_them() -> None:
    assert len(set(HOSTILE)) == len(HOSTILE) >= 15


# -------------------------------------------------------------------------------------------------- repository ids


@pytest.mark.parametrize("name", HOSTILE)
def test_repository_ids(parent: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    before = everything(parent)
    assert repr(name) in refusal(check_repo_id, name)
    flags = ["--model", "m", f"--push-to-hub={name}"]
    assert "is not a repository of the Hub" in command_line(capsys, parse_config, CommonsenseConfig, flags)
    line = command_line(capsys, main, ["push", "run", "--revision=main", "--", name])
    assert "is not a repository of the Hub" in line
    assert everything(parent) == before


@pytest.mark.parametrize(
    "name", [*(n for n in HOSTILE if n not in ("a/b/c", "a--b/c..d", "a/b.git")), "a/b.lock", "x."]
)
def test_branches(parent: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    before = everything(parent)
    assert repr(name) in refusal(check_branch, name)
    assert "is not a branch" in command_line(capsys, main, ["push", "run", "a/b", f"--revision={name}"])
    assert "is not a branch" in command_line(
        capsys, parse_config, CommonsenseConfig, ["--model", "m", f"--push-revision={name}"]
    )
    assert everything(parent) == before


def test_honest_names_are_not_refused() -> None:
    for name in ("a/b", "some-body/Some_Model-1.5b", "meta-llama/Llama-3.1-8B", "0x/7"):
        assert check_repo_id(name) == name
    for name in ("main", "v1.0", "tries/one", "a/b/c"):
        assert check_branch(name) == name


# -------------------------------------------------------------------------------------------------- shard indexes


def with_index(folder: Path, shard: str) -> Path:
    """Say that the third file of a sharded model is called otherwise."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    third = sorted(set(content["weight_map"].values()))[2]
    content["weight_map"] = {key: shard if name == third else name for key, name in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    return index


@pytest.mark.parametrize("name", [*(f"{name}.safetensors" for name in HOSTILE), "/etc/passwd", "", 7, None, ["a"], {}])
def test_shard_indexes(parent: Path, name: Any) -> None:
    merged = parent / "work" / "inner" / "run" / "merged"
    index = with_index(merged, name)
    before = everything(parent)
    adapter = AdapterWeights(
        "model.layers.0.self_attn.q_proj", torch.ones(96, 1), torch.ones(1), torch.ones(1, 96), 1.0, False
    )
    for message in (
        refusal(indexed_files, index),
        refusal(weight_files, merged),
        refusal(merge, [adapter], merged, merged.parent / "target"),
        refusal(check_export, merged, None),
    ):
        assert "index" in message and len(message) < 400
    assert everything(parent) == before


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", "[" * 20_000, "\0"])
def test_indexes_that_are_none(parent: Path, content: str) -> None:
    merged = parent / "work" / "inner" / "run" / "merged"
    (merged / "model.safetensors.index.json").write_text(content)
    before = everything(parent)
    assert "index" in refusal(check_export, merged, None)
    assert everything(parent) == before


def test_every_index_in_the_folder_counts(parent: Path) -> None:
    """An adapter's too, and one that this project would not read itself."""
    merged = parent / "work" / "inner" / "run" / "merged"
    index = {"weight_map": {"secret": "../outside.safetensors"}}
    (merged / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    assert "../outside.safetensors" in refusal(check_export, merged, None)


# ------------------------------------------------------------------------------------------------ adapter folders


def lora(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 2,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somebody/a-base",
        **changes,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 8), f"{name}.lora_B.weight": torch.ones(8, 1)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_an_honest_adapter_is_not_refused(tmp_path: Path) -> None:
    patterns = {"^model\\.layers\\.0\\.self_attn\\.q_proj$": 1, "q_proj": 2, "(q|k)_proj": 3}
    files = check_export(lora(tmp_path / "lora", rank_pattern=patterns), {"model.layers.0.self_attn.q_proj": 1})
    assert files.paths.keys() == {"adapter_config.json", "adapter_model.safetensors"} and files.left_out == ()
    (tmp_path / "base").mkdir()
    check_export(lora(tmp_path / "local", base_model_name_or_path=str(tmp_path / "base")), None)


@pytest.mark.parametrize("name", [*HOSTILE, "", None, 3, ["a/b"]])
def test_base_of_an_adapter(parent: Path, name: Any) -> None:
    folder = lora(parent / "work" / "lora", base_model_name_or_path=name)
    before = everything(parent)
    message = refusal(check_export, folder, None)
    assert "base_model_name_or_path" in message and len(message) < 500
    assert everything(parent) == before


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "key", ["(a+)+$", "(.*)*x", ".*.*.*.*x", "../../outside", "a b", "a\nb", "a{1,9999}", "[", "(", "", "a?b"]
)
def test_patterns_of_an_adapter(parent: Path, field: str, key: str) -> None:
    folder = lora(parent / "work" / "lora", **{field: {key: 4}})
    before = everything(parent)
    assert field in refusal(check_export, folder, None)
    assert field in refusal(read_peft, folder, 1.0)
    assert everything(parent) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": ["LORA"]}, {"peft_type": {}}, {"peft_type": None}, {"r": None}, {"r": 0}, {"lora_alpha": "../x"},
        {"lora_alpha": 1e999}, {"lora_alpha": -1}, {"lora_alpha": True}, {"rank_pattern": ["a"]},
        {"rank_pattern": {"q_proj": "../x"}}, {"alpha_pattern": {"q_proj": [1]}},
        {"peft_type": "ADALORA", "init_r": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_of_an_adapter_to_start_from(tmp_path: Path, changes: dict[str, Any]) -> None:
    before_reading = lora(tmp_path / "lora", **changes), everything(tmp_path)
    assert "init_from=" in refusal(read_peft, before_reading[0], 1.0)
    assert everything(tmp_path) == before_reading[1]


@pytest.mark.parametrize("content", ["[]", '"LORA"', "{", "[" * 20_000, "7"])
def test_configurations_that_are_none(tmp_path: Path, content: str) -> None:
    (lora(tmp_path / "lora") / "adapter_config.json").write_text(content)
    assert "no adapter folder of PEFT" in refusal(read_peft, tmp_path / "lora", 1.0)
    assert "adapter_config.json" in refusal(check_export, tmp_path / "lora", None)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../outside", "model", "model.layers", "lm_head.weight", "__class__", "a\nb"]
)
def test_matrices_of_an_adapter_folder(parent: Path, finished: Path, name: str) -> None:
    folder = parent / "work" / "adapter"
    folder.mkdir()
    tensors = {f"{name}.P": torch.ones(8, 1), f"{name}.lam": torch.ones(1), f"{name}.Q": torch.ones(1, 8)}
    save_file(tensors, folder / "adapter.safetensors")
    description = {
        "format": 2, "base_model": "a/b", "base_revision": None, "scales": {name: 1.0}, "rank_pattern": {name: 1},
        "shapes": {name: [8, 8]}, "transposed": [],
    }  # fmt: skip
    (folder / "adapter.json").write_text(json.dumps(description))
    before = everything(parent)
    model = tiny_llama(8)
    modules = {name for name, _ in model.named_modules()}
    line = refusal(load_adapter, model, folder)
    assert "is not in this model" in line or "is not the name of a matrix" in line
    assert {name for name, _ in model.named_modules()} == modules
    assert everything(parent) == before


# ---------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("name", ["config.json", "LICENSE", "extra.safetensors", "notes.txt", "folder"])
@pytest.mark.parametrize("relative", [True, False])
def test_links_out_of_the_folder(parent: Path, name: str, relative: bool) -> None:
    merged = parent / "work" / "inner" / "run" / "merged"
    target = parent / "work" if name == "folder" else parent / "work" / "outside.safetensors"
    (merged / name).unlink(missing_ok=True)
    (merged / name).symlink_to(os.path.relpath(target, merged) if relative else target)
    before = everything(parent)
    assert "leads out of the folder" in refusal(check_export, merged, None)
    assert everything(parent) == before


def test_links_out_of_a_base_are_not_merged(parent: Path) -> None:
    secret = parent / "secret.txt"
    secret.write_text("private")
    for target, refused in ((secret, True), (parent / "base" / "config.json", False)):
        base = parent / "base"
        base.mkdir(exist_ok=True)
        (base / "config.json").write_text("{}")
        (base / "LICENSE").unlink(missing_ok=True)
        (base / "LICENSE").symlink_to(target)
        if refused:
            with pytest.raises(UserError, match="out of the model's folder"):
                refuse_foreign_link(base / "LICENSE")
        else:
            refuse_foreign_link(base / "LICENSE")
    cached = parent / "models--a--b" / "snapshots" / "0" / "config.json"
    (parent / "models--a--b" / "blobs").mkdir(parents=True)
    (parent / "models--a--b" / "blobs" / "1").write_text("{}")
    cached.parent.mkdir(parents=True)
    cached.symlink_to("../../blobs/1")
    refuse_foreign_link(cached)


def test_links_within_the_folder_and_loops(parent: Path) -> None:
    merged = parent / "work" / "inner" / "run" / "merged"
    (merged / "LICENSE.txt").write_text("terms")
    (merged / "LICENSE").symlink_to("LICENSE.txt")
    (merged / "NOTICE").symlink_to("NOTICE")
    (merged / "folder").symlink_to(".")
    files = check_export(merged, None)
    assert files.paths["LICENSE"].read_text() == "terms" and files.left_out == ("NOTICE", "folder")


def test_a_card_that_is_a_link(parent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = lora(parent / "work" / "alone")
    (folder / "README.md").symlink_to(parent / "outside.safetensors")
    assert "leads out of the folder" in command_line(capsys, main, ["push", str(folder), "a/b"])
    (folder / "README.md").unlink()
    assert "no README.md" in command_line(capsys, main, ["push", str(folder), "a/b"])


def test_what_is_no_file(parent: Path) -> None:
    merged = parent / "work" / "inner" / "run" / "merged"
    (merged / "config.json").unlink()
    os.mkfifo(merged / "config.json")  # reading it would wait for ever
    assert "neither config.json" in refusal(check_export, merged, None)


@pytest.mark.parametrize(
    "name", ["-x.safetensors", "a b.safetensors", "a\nb.safetensors", "\u202ea.safetensors", "~.safetensors"]
)
def test_file_names(parent: Path, name: str) -> None:
    merged = parent / "work" / "inner" / "run" / "merged"
    shutil.copy(parent / "outside.safetensors", merged / name)
    before = everything(parent)
    assert "rename the file" in refusal(check_export, merged, None)
    assert everything(parent) == before


def test_the_listing_sees_what_it_should(parent: Path) -> None:
    """The control: each kind of change that the tests above exclude."""
    before = everything(parent)
    outside = parent / "work" / "outside.safetensors"
    assert load_file(outside)["secret"].tolist() == [1, 1, 1]
    for change in (
        lambda: (parent / "new").write_text(""),
        lambda: (parent / "new").unlink(),
        lambda: os.utime(outside, (1, 1)),
        lambda: outside.write_bytes(outside.read_bytes() + b" "),
    ):
        now = everything(parent)
        change()
        assert everything(parent) != now
    assert everything(parent) != before


@pytest.mark.parametrize("name", ["$\\frac{$", "$$", "a$_b$c", "\x1b[2Jlayers.0.q", "layers.0.\u202eq", "x" * 500])
def test_a_name_that_is_a_formula_or_an_escape_is_drawn_as_text(tmp_path: Path, name: str) -> None:
    draw_rank_map({f"model.layers.0.{name}": 2, name: 1}, tmp_path / "ranks.svg")
    drawn = (tmp_path / "ranks.svg").read_text(encoding="utf-8")
    assert "\x1b" not in drawn and "\u202e" not in drawn
    shown = rank_table({f"model.layers.0.{name}": 2, name: 1})
    assert all(line.isprintable() for line in shown.splitlines())
