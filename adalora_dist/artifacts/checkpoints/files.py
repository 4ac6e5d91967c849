"""The files of a checkpoint: written so that a crash at any moment leaves a whole one, verified before they are read.

A checkpoint is a folder ``step-00000120`` of plain files and ``manifest.json``, which has the size and the SHA-256 of
every other file and of itself. It comes into being by one rename::

    step-00000120.partial/   written and fsynced file by file, the manifest last, then the folder
    step-00000120/           after the rename; then the folder above is fsynced, and only then are old ones removed

A folder without that plain name is never read. Nothing is changed in place: a folder that stands where a new one has to
go is renamed first. This file knows no process group, no model and no pickle. Of the operating system it uses the
functions of ``os`` alone, so that tests can record every operation and replay any part of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adalora_dist.io.foreign_files import NotReadable, opened, read_plain

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial"
_REMOVED = ".removed"
_BLOCK_BYTES = 1 << 22


class Damaged(Exception):
    """A folder is not a whole checkpoint; the message names the file and says what is wrong with it."""


@dataclass(frozen=True)
class Written:
    """One file of a checkpoint, as its writer knows it."""

    name: str
    size_bytes: int
    sha256: str


def folder_name(step: int) -> str:
    """Of the checkpoint after ``step`` optimizer steps."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """The number of steps in a checkpoint's name; None if that is not the name of a finished checkpoint."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoints_in(root: Path) -> list[Path]:
    """Finished checkpoints, whole or damaged, the newest first."""
    if not os.path.isdir(root):
        return []
    found = [root / name for name in os.listdir(root) if _NAME.fullmatch(name)]
    return sorted(found, key=lambda folder: step_of(folder) or 0, reverse=True)


# ------------------------------------------------------------------------------------------------------------ writing


def start(root: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of ``step`` into; what an earlier attempt left there goes."""
    for folder in reversed([folder for folder in (root, *root.parents) if not os.path.isdir(folder)]):
        os.mkdir(folder)
        _sync_folder(folder.parent)
    partial = root / (folder_name(step) + _PARTIAL)
    _remove(partial)
    os.mkdir(partial)
    return partial


def write_file(path: Path, content: bytes) -> Written:
    """Write a new file and make sure that it is on the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view[:_BLOCK_BYTES]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Written(path.name, len(content), hashlib.sha256(content).hexdigest())


def publish(partial: Path, files: list[Written]) -> Path:
    """Give the folder its manifest and its name. What has that name already is set aside."""
    step = step_of(partial.with_suffix(""))
    table = {file.name: {"size_bytes": file.size_bytes, "sha256": file.sha256} for file in files}
    write_file(partial / MANIFEST, _manifest_text({"format": FORMAT, "step": step, "files": table}))
    _sync_folder(partial)
    final = partial.with_suffix("")
    if os.path.lexists(final):
        set_aside(final)
    os.rename(partial, final)
    _sync_folder(final.parent)
    return final


def rotate(root: Path, keep: int, spared: Collection[int] = ()) -> None:
    """Remove all but the ``keep`` newest checkpoints and those of the steps ``spared``, and what earlier runs left
    unfinished or set aside."""
    for folder in checkpoints_in(root)[keep:]:
        if step_of(folder) not in spared:
            set_aside(folder)
    for name in os.listdir(root):
        if name.endswith((_PARTIAL, _REMOVED)) and name.startswith("step-"):
            _remove(root / name)


def set_aside(folder: Path) -> Path:
    """Rename a checkpoint so that it is not read any more. The next :func:`rotate` removes it."""
    count = 0
    while os.path.lexists(aside := folder.with_name(f"{folder.name}.{count}{_REMOVED}")):
        count += 1
    os.rename(folder, aside)
    return aside


def discard(partial: Path) -> None:
    """Give up a checkpoint that cannot be completed."""
    _remove(partial)


def _remove(folder: Path) -> None:
    """Remove a folder, if it is there."""
    if os.path.isdir(folder) and not os.path.islink(folder):
        for name in os.listdir(folder):
            _remove(folder / name)
        os.rmdir(folder)
    elif os.path.lexists(folder):
        os.unlink(folder)


def _sync_folder(folder: Path) -> None:
    """Make sure that the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------ reading


def verify(folder: Path) -> None:
    """Read every byte of a checkpoint and compare it with the manifest. Files that it does not name do not count.

    Raises:
        Damaged: a file is missing, cannot be read or is not what was written.
    """
    for name, expected in read_manifest(folder).items():
        digest = hashlib.sha256()
        try:
            with opened(folder / name) as file:
                size_bytes = os.fstat(file.fileno()).st_size
                if size_bytes != expected["size_bytes"]:
                    raise Damaged(f"{folder / name} has {size_bytes:,} bytes instead of {expected['size_bytes']:,}")
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
        except NotReadable as reason:
            raise Damaged(f"{folder / name} cannot be read ({reason})") from None
        if digest.hexdigest() != expected["sha256"]:
            raise Damaged(f"{folder / name} is not what was written: its SHA-256 differs from the manifest's")


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 by file name. Any change of the manifest's bytes is noticed: they must be those written.

    Raises:
        Damaged: it is not what was written.
    """
    path = folder / MANIFEST
    try:
        content = read_plain(path)
        manifest = json.loads(content)
        description = {key: manifest[key] for key in ("format", "step", "files")}
        whole = _manifest_text(description) == content
    except NotReadable as reason:
        raise Damaged(f"{path} cannot be read ({reason})") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise Damaged(f"{path} is not what was written")
    if description["format"] != FORMAT:
        raise Damaged(f"{path} is of format {description['format']}; this version reads {FORMAT}")
    if description["step"] != step_of(folder):
        raise Damaged(f"{path} is that of step {description['step']}: the folder was renamed, or files were exchanged")
    listed: dict[str, dict[str, Any]] = description["files"]
    if not all(Path(name).name == name for name in listed):
        raise Damaged(f"{path} names files outside of its folder")
    return listed


def _manifest_text(description: Mapping[str, Any]) -> bytes:
    """The manifest with its own SHA-256, always the same bytes for the same content."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**description, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()
