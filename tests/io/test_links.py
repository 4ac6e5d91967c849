"""Whatever a command writes, a link under its name is replaced and never followed: not a byte goes elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adalora_dist.__main__ import main
from adalora_dist.artifacts.checkpoints import files
from adalora_dist.config.sections import RunConfig, TrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.training.faults.guard import STATUS_FILE, _write_status
from adalora_dist.training.faults.run_lock import RunLock
from adalora_dist.training.run_folder import RunFolder, refuse_used_folder
from tests.support.full_disk import full_disk
from tests.support.local_hub import write_inspectable_run
from tests.support.refusals import refusal

PRECIOUS = "precious\n"
LINKS: dict[str, Callable[[Path, Path], None]] = {
    "link": lambda path, target: path.symlink_to(target),
    "relative link": lambda path, target: path.symlink_to(os.path.relpath(target, path.parent)),
    "hard link": lambda path, target: os.link(target, path),
    "dangling link": lambda path, target: path.symlink_to(target.with_name("new")),
}
kinds = pytest.mark.parametrize("kind", LINKS)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Callable[[Path, str], None]]:
    """Puts a link of a kind under a name; at the end nothing may have come through it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text(PRECIOUS)
    yield lambda path, kind: LINKS[kind](path, outside / "precious")
    assert os.listdir(outside) == ["precious"] and (outside / "precious").read_text() == PRECIOUS


def start_run(folder: Path) -> RunFolder:
    return RunFolder(RunConfig(train=TrainConfig(output_dir=str(folder))), True, {})


@kinds
@pytest.mark.parametrize("name", ["config.yaml", "run.json", "metrics.jsonl"])
def test_a_run_begins(tmp_path: Path, place: Callable[[Path, str], None], name: str, kind: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    place(run / name, kind)
    try:
        start_run(run).log({"step": 0})
    except UserError as error:  # of another run's folder, or another run's log
        assert "output_dir" in str(error) and "\n" not in str(error)
    else:
        assert (run / name).is_file() and not (run / name).is_symlink()


@kinds
@pytest.mark.parametrize("name", ["results.json", "rank_pattern.json", "verification.json"])
def test_a_run_ends(tmp_path: Path, place: Callable[[Path, str], None], name: str, kind: str) -> None:
    run = start_run(tmp_path / "run")
    place(run.path / name, kind)
    run.write_json(name, {"a": 1})
    assert json.loads((run.path / name).read_text()) == {"a": 1} and not (run.path / name).is_symlink()


def test_a_log_on_a_full_disk(tmp_path: Path) -> None:
    run = start_run(tmp_path / "run")
    with full_disk(100):
        message = refusal(run.log, {"step": 0, "text": "x" * 200})
    assert message.startswith(f"{run.path / 'metrics.jsonl'} cannot be written (File too large; ")


ODD: dict[str, Callable[[Path], object]] = {
    "somebody's": lambda path: path.write_text("{}\n"),
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("name", ["metrics.jsonl", "allocations.jsonl"])
def test_nothing_is_appended_to_what_lies_there(tmp_path: Path, name: str, odd: str) -> None:
    """Nor is it waited for, or read into the first checkpoint. With --overwrite it goes."""
    run = tmp_path / "run"
    run.mkdir()
    ODD[odd](run / name)
    said = refusal(start_run, run)
    assert said.startswith(f"output_dir={run}") and f" {name} " in said
    RunFolder(RunConfig(train=TrainConfig(output_dir=str(run), overwrite=True)), True, {}).log({"step": 0})
    assert (run / "metrics.jsonl").read_text() == '{"step": 0}\n' and not os.path.lexists(run / "allocations.jsonl")


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    assert "File name too long" in refusal(start_run, tmp_path / ("x" * 300))


@kinds
def test_allocations(tmp_path: Path, place: Callable[[Path, str], None], kind: str) -> None:
    class Step:
        def events(self, first: int) -> list[dict[str, int]]:
            return [{"step": first}]

    run = start_run(tmp_path / "run")
    place(run.path / "allocations.jsonl", kind)
    assert "allocations.jsonl" in refusal(run.log_events, Step())


@kinds
@pytest.mark.parametrize("name", [".lock-owner", ".lock"])
def test_the_lock(tmp_path: Path, place: Callable[[Path, str], None], name: str, kind: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    place(run / name, kind)
    try:
        lock = RunLock(run)
    except UserError as error:
        assert name == ".lock" and "is a link" in str(error)
        return
    lock.touch()
    lock.release()
    assert not (run / ".lock-owner").exists()


@kinds
def test_the_status_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Callable[[Path, str], None], kind: str
) -> None:
    monkeypatch.setenv(STATUS_FILE, str(tmp_path / "status"))
    place(tmp_path / "status", kind)
    _write_status(7)
    assert json.loads((tmp_path / "status").read_text())["num_finished_steps"] == 7


@pytest.mark.parametrize("path", ["nowhere/status", "folder", "/proc/version", "/dev/full/x", "a" * 300])
def test_a_status_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    """And does not end a run with another exit code than that of a run that can go on."""
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv(STATUS_FILE, str(tmp_path / path))
    _write_status(7)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {STATUS_FILE}=")
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == []


@pytest.fixture(scope="module")
def run_of_somebody(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inspectable_run(tmp_path_factory.mktemp("project") / "run")


@kinds
@pytest.mark.parametrize("name", ["ranks.svg", "ranks.png", "history.svg", "history.png"])
def test_inspect(
    run_of_somebody: Path, tmp_path: Path, place: Callable[[Path, str], None], name: str, kind: str
) -> None:
    shutil.copytree(run_of_somebody, tmp_path / "run")
    place(tmp_path / "run" / name, kind)
    main(["inspect", str(tmp_path / "run"), "--pictures", Path(name).suffix[1:]])
    drawn = tmp_path / "run" / name
    assert not drawn.is_symlink() and drawn.stat().st_size > 1000
    assert not list((tmp_path / "run").glob(".*.partial"))


def test_inspect_where_a_folder_has_the_name(
    run_of_somebody: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_of_somebody, tmp_path / "run")
    (tmp_path / "run" / "ranks.svg").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(tmp_path / "run")])
    assert stopped.value.code == 2 and "ranks.svg cannot be written (" in capsys.readouterr().err


@kinds
@pytest.mark.parametrize("name", ["a", "manifest.json"])
def test_checkpoints(tmp_path: Path, place: Callable[[Path, str], None], name: str, kind: str) -> None:
    partial = files.start(tmp_path / "checkpoints", 3)
    place(partial / name, kind)
    with pytest.raises(FileExistsError):
        files.publish(partial, [files.write_file(partial / "a", b"x")])


def test_folders_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    for name in ("checkpoints", "adapter", "merged"):
        run = tmp_path / f"run-{name}"
        run.mkdir()
        (run / name).symlink_to(tmp_path / "outside")
        config = RunConfig(train=TrainConfig(output_dir=str(run)))
        assert f"{name} is a link" in refusal(refuse_used_folder, config)
    assert os.listdir(tmp_path / "outside") == []
