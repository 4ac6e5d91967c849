"""Files and folders appear whole or not at all, whoever is killed, waits, or has left a link in their place."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adalora_dist.config.flags import user_errors
from adalora_dist.io.errors import UserError
from adalora_dist.io.publish import PARTIAL, building, discard, new_file, open_to_append, write_whole, writing
from tests.support.full_disk import full_disk
from tests.support.kills import killed_at_line
from tests.support.limits import HANG_SECONDS, wait_until
from tests.support.paths import ROOT
from tests.support.refusals import refusal

NAMES = ("a", "b/c", "d")
SIZE_BYTES = 20_000


def fill(scratch: Path, letter: str = "x") -> None:
    (scratch / "b").mkdir()
    for name in NAMES:
        with (scratch / name).open("w") as file:
            for _ in range(10):
                file.write(letter * (SIZE_BYTES // 10))
                file.flush()


def whole(folder: Path) -> set[str]:
    """The letters that all files of a folder consist of: one, or it is not whole."""
    contents = [(folder / name).read_text() for name in NAMES]
    assert {len(content) for content in contents} == {SIZE_BYTES}
    return set("".join(contents))


def build(folder: Path, letter: str = "x") -> None:
    with building(folder) as scratch:
        fill(scratch, letter)


def child(folder: Path, letter: str = "x") -> subprocess.Popen[str]:
    """A process that builds the folder; says "filled" when all is in its scratch folder, and ends when told to."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom adalora_dist.config.flags import user_errors\n"
        "from adalora_dist.io.publish import building\nfrom tests.io.test_publish import fill\n"
        "with user_errors(), building(Path(sys.argv[1])) as scratch:\n"
        "    fill(scratch, sys.argv[2])\n    print('filled', flush=True)\n    sys.stdin.readline()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = [sys.executable, "-c", code, str(folder), letter]
    return subprocess.Popen(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)


# ------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with building(folder) as scratch:
        assert scratch.parent == folder.parent and scratch.name.endswith(PARTIAL)
        fill(scratch)
        assert not folder.exists()
    assert whole(folder) == {"x"} and os.listdir(folder.parent) == ["folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_what_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), building(tmp_path / "folder") as scratch:
        fill(scratch)
        raise error
    assert os.listdir(tmp_path) == []


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    before = sorted(os.listdir(tmp_path))
    for name in ("file", "link", "dangling", "folder"):
        assert name in refusal(build, tmp_path / name)
    for name in ("file", "link", "dangling", "folder"):
        with pytest.raises(UserError), building(tmp_path / name, replaces=lambda folder: False):
            raise AssertionError
    with pytest.raises(UserError, match="exists"), building(tmp_path / "late") as scratch:
        fill(scratch)
        (tmp_path / "late").mkdir()  # somebody else was faster
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "late"])
    assert os.listdir(tmp_path / "elsewhere") == os.listdir(tmp_path / "late") == []
    assert (tmp_path / "folder" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"


def test_an_earlier_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    build(folder, "x")
    (folder / "old").write_text("")
    with pytest.raises(RuntimeError), building(folder, replaces=lambda old: (old / "a").is_file()) as scratch:
        fill(scratch, "y")
        raise RuntimeError
    assert whole(folder) == {"x"}
    with building(folder, replaces=lambda old: (old / "a").is_file()) as scratch:
        fill(scratch, "y")
        assert whole(folder) == {"x"}
    assert whole(folder) == {"y"} and not (folder / "old").exists() and os.listdir(tmp_path) == ["folder"]


def test_removing_a_folder_does_not_follow_links(tmp_path: Path) -> None:
    build(tmp_path / "folder")
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "folder" / "link").symlink_to("..")
    discard(tmp_path / "link")
    discard(tmp_path / "nowhere")
    assert os.listdir(tmp_path) == ["folder"]
    discard(tmp_path / "folder")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_modes_are_those_of_any_new_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with building(tmp_path / "folder") as scratch:
            fill(scratch)
            (scratch / "a").chmod(0o600)  # as safetensors does
        write_whole(tmp_path / "file", "x")
        open_to_append(tmp_path / "log").close()
    finally:
        os.umask(before)
    files = [*(tmp_path / "folder" / name for name in NAMES), tmp_path / "file", tmp_path / "log"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    with full_disk(SIZE_BYTES // 2):
        message = refusal(build, tmp_path / "folder")
        with pytest.raises(UserError, match="free some room"), writing(tmp_path / "file"):
            write_whole(tmp_path / "file", "x" * SIZE_BYTES)
    assert re.search(r"folder cannot be written \(File too large; [\d,]+ bytes are free\): free some room", message)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_full_under_a_library(capsys: pytest.CaptureFixture[str]) -> None:
    """In the main thread and in another one, as a tracker's: a line each, and no traceback."""

    def fails(number: int = errno.ENOSPC) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(SystemExit) as ended, user_errors():
        thread = threading.Thread(target=fails, name="writer")
        thread.start()
        thread.join()
        fails()
    assert ended.value.code == 2
    said = "a file cannot be written (No space left on device): free some room, or give folders on another disk"
    assert (
        capsys.readouterr().err == f"warning: writer has ended: {said}, and run again\nerror: {said}, and run again\n"
    )
    with pytest.raises(PermissionError), user_errors():  # may be anything
        fails(errno.EACCES)
    with pytest.raises(SystemExit), user_errors():
        raise PermissionError(errno.EACCES, "Permission denied", "/somebody/s")
    assert capsys.readouterr().err.startswith("error: /somebody/s is not for this user (Permission denied): ")
    with pytest.raises(SystemExit), user_errors():
        fails(errno.EIO)


def test_names_that_no_file_can_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name in ("x" * 300, "loop", "a\0b"):
        with pytest.raises(SystemExit) as ended, user_errors():
            (tmp_path / name).resolve().stat()
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("error: there can be no such file (") and said.count("\n") == 1
    with pytest.raises(ValueError, match="another"), user_errors():
        raise ValueError("another")


# -------------------------------------------------------------------------------------------- more than one, and kills


def test_two_at_once(tmp_path: Path) -> None:
    """One wins; the other is refused at once, in one line, and has written nothing."""
    first = child(tmp_path / "folder")
    assert first.stdout is not None and first.stdout.readline() == "filled\n"
    assert "another process" in refusal(build, tmp_path / "folder")
    second = child(tmp_path / "folder", "y")
    out, errors = second.communicate(timeout=HANG_SECONDS)
    assert (second.returncode, out) == (2, "") and errors.startswith("error: ") and errors.count("\n") == 1
    first.communicate("\n", timeout=HANG_SECONDS)
    assert first.returncode == 0 and whole(tmp_path / "folder") == {"x"}
    assert os.listdir(tmp_path) == ["folder"]


def test_a_crowd(tmp_path: Path) -> None:
    processes = [child(tmp_path / "folder", letter) for letter in "uvwxyz"]
    wait_until(lambda: sum(process.poll() is None for process in processes) <= 1)
    codes = [(process.communicate("\n", timeout=HANG_SECONDS), process.returncode)[1] for process in processes]
    assert sorted(codes) == [0, 2, 2, 2, 2, 2]
    [letter] = whole(tmp_path / "folder")
    assert codes["uvwxyz".index(letter)] == 0 and os.listdir(tmp_path) == ["folder"]


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    process = child(tmp_path / "folder")
    assert process.stdout is not None and process.stdout.readline() == "filled\n"
    process.kill()
    process.communicate()
    [left] = os.listdir(tmp_path)
    assert left.startswith(".folder.") and left.endswith(PARTIAL)
    build(tmp_path / "folder.b")  # another name: none of its business
    assert left in os.listdir(tmp_path)
    build(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["folder", "folder.b"]


def test_what_another_machine_left_goes_when_nothing_moves(tmp_path: Path) -> None:
    left = tmp_path / f".folder.elsewhere-1-0123abcd{PARTIAL}"
    left.mkdir()
    (left / "a").write_text("x")
    assert "another process" in refusal(build, tmp_path / "folder")
    for path in (left / "a", left):
        os.utime(path, (time.time() - 7200,) * 2)
    (tmp_path / f".folder.elsewhere-1-4567cdef{PARTIAL}").symlink_to(ROOT)
    build(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"] and ROOT.is_dir()


EACH_LINE = pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
"""A process for each of 4,000 lines."""


@pytest.mark.parametrize("stride", [50, EACH_LINE])
def test_a_reader_never_sees_a_half_folder(tmp_path: Path, stride: int) -> None:
    folder, num_killed, num_seen = tmp_path / "folder", 0, 0

    def look() -> None:
        nonlocal num_seen
        if folder.exists():
            assert whole(folder) == {"x"}
            num_seen += 1

    while (code := killed_at_line(lambda: build(folder), look, 1 + num_killed * stride)) is None:
        num_killed += 1
        discard(folder)
    assert code == 0 and num_seen and num_killed > 10
    discard(folder)
    build(folder)  # what was killed before is not in its way
    assert os.listdir(tmp_path) == ["folder"]


# --------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A file somewhere else, and what must be in it afterwards."""
    (tmp_path / "outside").mkdir()
    path = tmp_path / "outside" / "precious"
    path.write_text("precious")
    (tmp_path / "inside").mkdir()
    yield path
    assert path.read_text() == "precious" and os.listdir(tmp_path / "outside") == ["precious"]


def test_a_file_replaces_a_link_and_not_its_target(tmp_path: Path, outside: Path) -> None:
    inside = tmp_path / "inside"
    (inside / "link").symlink_to(outside)
    (inside / "dangling").symlink_to(tmp_path / "outside" / "new")
    os.link(outside, inside / "hard")
    for name in ("link", "dangling", "hard"):
        write_whole(inside / name, "ours")
        assert (inside / name).read_text() == "ours" and not (inside / name).is_symlink()
    assert sorted(os.listdir(inside)) == ["dangling", "hard", "link"]


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")
    with pytest.raises(KeyboardInterrupt), new_file(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "folder", "new")
    assert path.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_log_is_a_plain_file_of_its_folder(tmp_path: Path, outside: Path) -> None:
    inside = tmp_path / "inside"
    (inside / "link").symlink_to(outside)
    (inside / "dangling").symlink_to(tmp_path / "outside" / "new")
    (inside / "device").symlink_to("/dev/null")
    os.link(outside, inside / "hard")
    os.mkfifo(inside / "pipe")
    (inside / "folder").mkdir()
    for name in ("link", "dangling", "device", "hard", "pipe", "folder"):
        with pytest.raises(UserError) as caught, writing(inside / name):
            open_to_append(inside / name)
        assert str(caught.value).startswith(f"{inside / name} cannot be written (")
    for text in ("a", "b"):
        with open_to_append(inside / "log") as file:
            file.write(text)
    assert (inside / "log").read_text() == "ab"


def test_a_long_name(tmp_path: Path) -> None:
    name = "ü" * 120  # 240 bytes of 255
    write_whole(tmp_path / name, "x")
    build(tmp_path / (name + "y"))
    assert whole(tmp_path / (name + "y")) and len(os.listdir(tmp_path)) == 2
