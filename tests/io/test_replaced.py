"""No output of a command takes the place of what somebody else made, and none is ever there by half."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adalora_dist.__main__ import main
from adalora_dist.config.sections import RunConfig, TrainConfig
from adalora_dist.training.faults.guard import STATUS_FILE, _write_status
from adalora_dist.training.run_folder import WRITTEN, RunFolder
from adalora_dist.training.shelf import copy, write_schema
from tests.support.full_disk import full_disk
from tests.support.local_hub import write_inspectable_run
from tests.support.paths import ROOT
from tests.support.refusals import refusal

SOMEBODYS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_text("precious"),
    "picture": lambda path: path.write_text('<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>\n'),
    "long": lambda path: path.write_bytes(b"x" * 5000 + b"drawn by adalora-dist inspect"),
    "pipe": lambda path: os.mkfifo(path),
}
kinds = pytest.mark.parametrize("kind", SOMEBODYS)


def about(folder: Path) -> dict[str, object]:
    """Every file of a folder: what it is, when it was written, and what is in it."""
    return {
        path.name: (path.lstat().st_ino, path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.iterdir()
    }


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inspectable_run(tmp_path_factory.mktemp("project") / "run")


@kinds
@pytest.mark.parametrize("name", ["ranks.svg", "history.svg", "ranks.png", "history.png"])
def test_inspect(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str) -> None:
    run, ending = tmp_path / "run", Path(name).suffix[1:]
    shutil.copytree(finished_run, run)
    SOMEBODYS[kind](run / name)
    before = about(run)
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(run), "--pictures", ending])
    said = capsys.readouterr()
    assert stopped.value.code == 2 and not said.out
    [line] = said.err.splitlines()
    assert f"{run / name} is there and is not of adalora-dist: rename it" in line and "--pictures none" in line
    assert about(run) == before
    main(["inspect", str(run), "--pictures", "none"])
    assert about(run) == before


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_inspect_draws_its_own_again(finished_run: Path, tmp_path: Path, ending: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    (run / f"ranks.{ending}").touch()  # empty: nothing is lost
    for _ in range(2):
        main(["inspect", str(run), "--pictures", ending])
    assert all((run / f"{name}.{ending}").stat().st_size > 1000 for name in ("ranks", "history"))


@pytest.mark.parametrize("name", ["llama_sft", "llama_sft_demo", "zero3.json", "slurm"])
def test_a_copy_on_a_full_disk(tmp_path: Path, name: str) -> None:
    with full_disk(100):
        said = refusal(copy, name, tmp_path / "mine")
    assert (
        said
        == f"{tmp_path / 'mine'} cannot be written (File too large): name a file on another disk, or free some room"
    )
    assert not list(tmp_path.iterdir())


def test_a_schema_on_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("# yaml-language-server: $schema=llama_sft.schema.json\n")
    with full_disk(100):
        said = refusal(write_schema, tmp_path / "mine.yaml")
    assert "llama_sft.schema.json cannot be written (File too large)" in said
    assert os.listdir(tmp_path) == ["mine.yaml"]


ODD: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_text("precious"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "pipe": lambda path: os.mkfifo(path),
}


@pytest.mark.parametrize("odd", ODD)
def test_copies_replace_nothing(tmp_path: Path, odd: str) -> None:
    ODD[odd](tmp_path / "mine.yaml")
    ODD[odd](tmp_path / "llama_sft.schema.json")
    before = about(tmp_path)
    assert "mine.yaml exists already" in refusal(copy, "llama_sft_demo", tmp_path / "mine.yaml")
    assert about(tmp_path) == before
    copied = copy("llama_sft_demo", tmp_path / "another.yaml")
    assert write_schema(copied) is None and {**about(tmp_path), **before} == about(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", "llama_sft.schema.json", "another.yaml"}


def test_a_copy_where_files_have_one_name_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    copied = copy("llama_sft", tmp_path / "mine.py")
    assert copied.read_bytes() == (ROOT / "recipes" / "llama_sft.py").read_bytes()
    assert "exists already" in refusal(copy, "llama_sft", copied) and os.listdir(tmp_path) == ["mine.py"]


# --------------------------------------------------------------------------------------------------------- run folders


def config_of(folder: Path, **train: object) -> RunConfig:
    return RunConfig(train=TrainConfig(output_dir=str(folder), **train))


@pytest.mark.parametrize("resume", ["never", "auto"])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_run_begins_beside_no_file_of_somebody(tmp_path: Path, name: str, resume: str) -> None:
    (tmp_path / name).write_text("model: {}\n")
    before = about(tmp_path)
    said = refusal(RunFolder, config_of(tmp_path, resume=resume), True, {})
    assert said.startswith(f"output_dir={tmp_path} ") and "choose another --output-dir" in said
    assert about(tmp_path) == before


@pytest.mark.parametrize("content", ["", "model: {}\n", "train: {epochs: 3}\n", "[1]", "\x00"])
def test_nothing_is_cleared_that_is_no_run(tmp_path: Path, content: str) -> None:
    """--overwrite removes a whole folder: that of a project, with its own config.yaml, is none."""
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / "thesis.tex").write_text("precious")
    before = about(tmp_path)
    said = refusal(RunFolder, config_of(tmp_path, overwrite=True), True, {})
    assert said.startswith(f"output_dir={tmp_path} holds config.yaml, which is of no run") and about(tmp_path) == before


@pytest.mark.parametrize("damaged", ["config.yaml", "run.json"])
def test_a_damaged_run_is_still_one(tmp_path: Path, damaged: str) -> None:
    RunFolder(config_of(tmp_path / "run"), True, {})
    (tmp_path / "run" / damaged).write_text("\x00")
    (tmp_path / "run" / "results.json").write_text("{}")
    RunFolder(config_of(tmp_path / "run", resume="auto"), True, {})
    (tmp_path / "run" / damaged).write_text("\x00")
    RunFolder(config_of(tmp_path / "run", overwrite=True), True, {})
    assert not (tmp_path / "run" / "results.json").exists()


def test_every_file_that_a_run_writes_whole_is_known() -> None:
    sources = [*(ROOT / "recipes").glob("*.py"), *(ROOT / "adalora_dist").rglob("*.py")]
    pattern = re.compile(r'\.write_(?:json|lines)\("([^"]+)"|write_whole\([\w.]+ / "([^"]+)"')
    found = {one or other for path in sources for one, other in pattern.findall(path.read_text(encoding="utf-8"))}
    assert found == set(WRITTEN)


@kinds
def test_a_status_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.setenv(STATUS_FILE, str(tmp_path / "status"))
    SOMEBODYS[kind](tmp_path / "status")
    before = about(tmp_path)
    _write_status(7)
    assert "is not of adalora-dist" in capsys.readouterr().err and about(tmp_path) == before
    (tmp_path / "status").unlink()
    for step in (3, 4):
        _write_status(step)
        assert f'"num_finished_steps": {step}' in (tmp_path / "status").read_text()
