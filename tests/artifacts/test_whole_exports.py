"""Every export is whole from the moment that it has its name: weights, configuration and tokenizer."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from adalora_dist.artifacts.export import merge, read_adapter, save_adapter
from adalora_dist.artifacts.hub.files import check_export
from adalora_dist.artifacts.peft_format import save_adalora, save_lora
from adalora_dist.artifacts.whole import check_files, check_whole
from adalora_dist.backbones.load import load_tokenizer
from adalora_dist.backbones.tokenizer import save_tokenizer
from adalora_dist.config.sections import ModelConfig
from adalora_dist.io.publish import discard
from adalora_dist.methods.update import AdapterWeights
from tests.support.full_disk import full_disk
from tests.support.kills import killed_at_line, num_lines
from tests.support.refusals import refusal
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama

MATRIX = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(260).save_pretrained(folder, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def adapters() -> list[AdapterWeights]:
    d_out, d_in = tiny_llama(8).get_submodule(MATRIX).weight.shape
    return [AdapterWeights(MATRIX, torch.ones(d_out, 2), torch.ones(2), torch.ones(2, d_in), 0.5, False)]


def used_tokenizer(base: Path):
    """With what its last call asked for still in it."""
    tokenizer = load_tokenizer(ModelConfig(name=str(base)))
    tokenizer(["a text", "b"], truncation=True, max_length=3, padding="max_length")
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 3 and tokenizer.backend_tokenizer.padding is not None
    return tokenizer


def writers(base: Path) -> dict[str, Callable[[Path], None]]:
    trained = {"lm_head.weight": torch.ones(260, 32)}
    tokenizer = used_tokenizer(base)
    return {
        "merged": lambda out: merge(adapters(), base, out, show_progress=False, tokenizer=tokenizer),
        "adapter": lambda out: save_adapter(adapters(), out, str(base), None, trained, {"architectures": ["A"]}),
        "lora": lambda out: save_lora(adapters(), out, str(base), trained=trained),
        "peft": lambda out: save_adalora(adapters(), out, str(base)),
    }


FORMS = ("merged", "adapter", "lora", "peft")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ----------------------------------------------------------------------------------------------------------- all forms


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_trials", [5, pytest.param(15, marks=pytest.mark.slow)])
def test_a_reader_never_sees_a_half_export(base: Path, tmp_path: Path, form: str, num_trials: int) -> None:
    torch.set_num_threads(1)  # for the processes that are forked
    write = writers(base)[form]
    write(tmp_path / "expected")
    expected, folder = contents(tmp_path / "expected"), tmp_path / form
    num_seen = 0

    def look() -> None:
        nonlocal num_seen
        if folder.exists():
            assert contents(folder) == expected
            num_seen += 1

    num = num_lines(lambda: write(tmp_path / "counted"))
    discard(tmp_path / "counted")
    for trial in range(num_trials):
        assert killed_at_line(lambda: write(folder), look, (2 * trial + 1) * num // (2 * num_trials)) is None
        discard(folder)
    write(folder)  # what was killed before is not in its way
    look()
    assert num_seen and sorted(os.listdir(tmp_path)) == sorted(["expected", form])


@pytest.mark.parametrize("form", FORMS)
def test_anybody_may_read_it_whom_the_umask_lets(base: Path, tmp_path: Path, form: str) -> None:
    before = os.umask(0o022)
    try:
        writers(base)[form](tmp_path / form)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / form).iterdir()}
    assert set(modes.values()) == {0o644} and any(name.endswith(".safetensors") for name in modes)


@pytest.mark.parametrize("limit_bytes", [100, 600])
@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_is_one_line_and_leaves_nothing(base: Path, tmp_path: Path, form: str, limit_bytes: int) -> None:
    write = writers(base)[form]
    with full_disk(limit_bytes):
        message = refusal(write, tmp_path / form)
    assert message.startswith(f"{tmp_path / form} cannot be written (File too large; ") and len(message) < 300
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_written_through_a_link(base: Path, tmp_path: Path, form: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / form).symlink_to("elsewhere")
    assert "is a link" in refusal(writers(base)[form], tmp_path / form)
    assert os.listdir(tmp_path / "elsewhere") == [] and sorted(os.listdir(tmp_path)) == sorted(["elsewhere", form])


def test_an_adapter_is_replaced_by_its_successor_alone(base: Path, tmp_path: Path) -> None:
    write = writers(base)["adapter"]
    write(tmp_path / "adapter")
    save_adapter(adapters(), tmp_path / "adapter", "other", None)
    assert read_adapter(tmp_path / "adapter").base_model == "other"
    assert not (tmp_path / "adapter" / "trained.safetensors").exists(), "of the one before"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    assert "exists" in refusal(write, tmp_path / "folder")
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"


def test_what_does_not_arrive_is_noticed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    check_whole(tmp_path, {"a.safetensors": ["a"]})
    for missing in ({"a.safetensors": ["a", "b"]}, {"a.safetensors": []}, {"b.safetensors": ["a"]}):
        assert "has not come to the disk" in refusal(check_whole, tmp_path, missing)


# ------------------------------------------------------------------------------------------------------- the tokenizer


@pytest.mark.parametrize("rules", [(None, None), (9, None), (None, 5), (9, 5)])
def test_a_tokenizer_is_exported_as_it_was_loaded(
    base: Path, tmp_path: Path, rules: tuple[int | None, int | None]
) -> None:
    """Whatever it was used for meanwhile: nobody's texts are cut to the length of our last row."""
    source = tmp_path / "source"
    tokenizer = byte_tokenizer()
    if rules[0]:
        tokenizer.backend_tokenizer.enable_truncation(rules[0])
    if rules[1]:
        tokenizer.backend_tokenizer.enable_padding(length=rules[1], pad_token="<pad>")
    tokenizer.save_pretrained(source)
    tokenizer = used_tokenizer(source)
    left = tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding
    save_tokenizer(tokenizer, tmp_path / "saved")
    assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == left
    before, after = (json.loads((folder / "tokenizer.json").read_text()) for folder in (source, tmp_path / "saved"))
    assert after == before and bool(after["truncation"]) == bool(rules[0])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "saved").backend_tokenizer.encode("a" * 40).ids) in (41, 9)


def test_a_merged_model_has_its_tokenizer_from_the_first_moment(base: Path, tmp_path: Path) -> None:
    writers(base)["merged"](tmp_path / "merged")
    rules = json.loads((tmp_path / "merged" / "tokenizer.json").read_text())
    assert rules["truncation"] is None and rules["padding"] is None
    assert rules == json.loads((base / "tokenizer.json").read_text())


# ---------------------------------------------------------------------------------------------------------------- push

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"])
def test_every_file_that_is_sent_is_read_before(
    base: Path, tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    writers(base)["merged"](tmp_path / "merged")
    assert name in check_export(tmp_path / "merged", None).paths
    path = tmp_path / "merged" / name
    path.write_bytes(damage(path.read_bytes()))
    assert refusal(check_export, tmp_path / "merged", None).startswith(f"{path} cannot be read (")


def test_words_that_are_none(base: Path, tmp_path: Path) -> None:
    for name, content in {
        "tokenizer.json": b'{"version": "1.0"}', "vocab.txt": b"\xff\xfe", "merges.txt": b"", "tokenizer.model": b"",
        "chat_template.jinja": b"", "added_tokens.json": b"[]", "vocab.json": b"{", "special_tokens_map.json": b"",
    }.items():  # fmt: skip
        path = tmp_path / name
        path.write_bytes(content)
        assert refusal(check_files, [path]).startswith(str(path))
        message = refusal(merge_beside, base, tmp_path, path)
        assert name in message and len(message) < 300
        path.unlink()


def merge_beside(base: Path, tmp_path: Path, extra: Path) -> None:
    """A merge into a base that has one more file; found out before anything is written."""
    other = tmp_path / f"base-{extra.name}"
    other.mkdir()
    for name, content in (contents(base) | {extra.name: extra.read_bytes()}).items():
        (other / name).write_bytes(content)
    merge(adapters(), other, tmp_path / "merged", show_progress=False)
    assert load_file(tmp_path / "merged" / "model.safetensors")
