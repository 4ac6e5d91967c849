"""What can happen to checkpoint files, as data: every state that a crash can leave, and damage of every kind.

``record`` writes checkpoints through the real writer and notes each operation on files. ``crash_states`` replays any
part of them on a model of a disk that loses whatever was not fsynced, in ways that file systems are allowed to.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from adalora_dist.artifacts.checkpoints import files as checkpoint_files
from adalora_dist.artifacts.checkpoints.writer import CheckpointWriter, newest_checkpoint
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.protocol import trained_parameters
from tests.support.models import adapted_net, config

Operation = tuple[Any, ...]


class Run:
    """A small model under training, as far as a checkpoint sees it; ``save`` can be at any step."""

    def __init__(self, root: Path, keep: int = 2) -> None:
        self.model = adapted_net(config())
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        self.hooks = attach(self.model, self.optimizer, config(), 60)
        self.hooks.detach()
        self.hooks.bind(self.optimizer)
        self.parameters = trained_parameters(self.model)
        self.writer = CheckpointWriter(root, keep)

    @torch.no_grad()
    def save(self, step: int) -> None:
        self.hooks.step = step
        for number, parameter in enumerate(self.parameters.values()):
            parameter.fill_(step + number / 100)
        logs = {"metrics.jsonl": b"{}\n"}
        self.writer.save(step, self.parameters, self.optimizer, self.hooks, {"step": step}, logs)


class _RecordingOs:
    """``os`` as the writer sees it, with a note of everything that changes files."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._paths: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        descriptor = os.open(path, flags, mode)
        self._paths[descriptor] = str(path)
        if flags & os.O_CREAT:
            self.operations.append(("create", str(path)))
        return descriptor

    def write(self, descriptor: int, content: Any) -> int:
        num = os.write(descriptor, bytes(content)[: max(1, len(content) // 2)])  # as short as the system may make it
        self.operations.append(("write", self._paths[descriptor], bytes(content)[:num]))
        return num

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)
        self.operations.append(("fsync", self._paths[descriptor]))

    def _noted(name: str) -> Callable[..., None]:  # type: ignore[misc]
        def call(self: _RecordingOs, *paths: Any) -> None:
            getattr(os, name)(*paths)
            self.operations.append((name, *map(str, paths)))

        return call

    mkdir, rename, unlink, rmdir = map(_noted, ("mkdir", "rename", "unlink", "rmdir"))


def record(action: Callable[[], None]) -> list[Operation]:
    """The operations on files that ``action`` makes through the checkpoint writer."""
    recording = _RecordingOs()
    checkpoint_files.os = recording  # type: ignore[attr-defined]
    try:
        action()
    finally:
        checkpoint_files.os = os  # type: ignore[attr-defined]
    return recording.operations


# ------------------------------------------------------------------------------------------------- a disk that loses


@dataclass(eq=False)
class _File:
    synced: bytes = b""
    content: bytes = b""


@dataclass(eq=False)
class _Folder:
    synced: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, Any] = field(default_factory=dict)
    pending: list[tuple[str, Any, str | None]] = field(default_factory=list)
    """(name, what it is now or None, name that goes with it or None), since the last fsync of this folder."""

    def change(self, name: str, entry: Any, gone: str | None = None) -> None:
        self.pending.append((name, entry, gone))
        _apply(self.entries, (name, entry, gone))


def _apply(entries: dict[str, Any], change: tuple[str, Any, str | None]) -> None:
    name, entry, gone = change
    if gone is not None:
        entries.pop(gone, None)
    if entry is None:
        entries.pop(name, None)
    else:
        entries[name] = entry


class Disk:
    """Files and folders below ``root``, with what of them would survive a loss of power."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.top = self._existing(root)

    def _existing(self, folder: Path) -> _Folder:
        entries: dict[str, Any] = {}
        for path in sorted(folder.iterdir()):
            content = b"" if path.is_dir() else path.read_bytes()
            entries[path.name] = self._existing(path) if path.is_dir() else _File(content, content)
        return _Folder(dict(entries), dict(entries))

    def _find(self, path: str) -> tuple[_Folder, str]:
        *folders, name = Path(path).relative_to(self._root).parts
        folder = self.top
        for part in folders:
            folder = folder.entries[part]
        return folder, name

    def do(self, operation: Operation) -> None:
        kind, path, *rest = operation
        if Path(path) == self._root:
            assert kind == "fsync"
            target: Any = self.top
        else:
            folder, name = self._find(path)
            target = folder.entries.get(name)
        if kind == "mkdir":
            folder.change(name, _Folder())
        elif kind == "create":
            folder.change(name, _File())
        elif kind == "write":
            target.content += rest[0]
        elif kind == "rename":
            other, new = self._find(rest[0])
            assert other is folder, "the model knows renames within a folder"
            folder.change(new, target, gone=name)
        elif kind in ("unlink", "rmdir"):
            assert kind == "unlink" or not target.entries
            folder.change(name, None)
        elif isinstance(target, _File):
            target.synced = target.content
        else:
            target.synced, target.pending = dict(target.entries), []

    def survivors(self) -> Iterator[dict[str, bytes | None]]:
        """Every combination of what is left: path -> content, None for a folder.

        Of changes to a folder since its fsync: all, none, each alone, each but one. Of a file since its fsync: all of
        it, nothing, half of it (a torn write), or zeros of its length.
        """
        pending = list(_pending(self.top))
        choices: list[frozenset[int]] = [frozenset(), frozenset(range(len(pending)))]
        choices += [frozenset([k]) for k in range(len(pending))]
        choices += [frozenset(range(len(pending))) - {k} for k in range(len(pending))]
        for kept in dict.fromkeys(choices):
            changes = {id(pending[k]) for k in kept}
            for keep_of_file in (1.0, 0.0, 0.5, None):
                yield dict(_left("", self.top, changes, keep_of_file))


def _pending(folder: _Folder) -> Iterator[tuple[str, Any, str | None]]:
    yield from folder.pending
    for entry in folder.entries.values():
        if isinstance(entry, _Folder):
            yield from _pending(entry)


def _left(path: str, folder: _Folder, changes: set[int], keep_of_file: float | None) -> Iterator[tuple[str, Any]]:
    entries = dict(folder.synced)
    for change in folder.pending:
        if id(change) in changes:
            _apply(entries, change)
    for name, entry in entries.items():
        where = f"{path}/{name}" if path else name
        if isinstance(entry, _Folder):
            yield where, None
            yield from _left(where, entry, changes, keep_of_file)
        else:
            new = entry.content[len(entry.synced) :]
            left = bytes(len(new)) if keep_of_file is None else new[: int(keep_of_file * len(new))]
            yield where, entry.synced + left


def crash_states(root: Path, before: Disk, operations: list[Operation]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of operations done, what is on the disk) for every prefix of ``operations``; each state once."""
    seen = set()
    for done in range(len(operations) + 1):
        if done:
            before.do(operations[done - 1])
        for state in before.survivors():
            key = hash(frozenset(state.items()))
            if key not in seen:
                seen.add(key)
                yield done, state


def materialise(state: dict[str, bytes | None], root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for path, content in sorted(state.items()):
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)


# ------------------------------------------------------------------------------------------------------------ damage


def flip_a_bit(path: Path, other: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def cut_off(path: Path, other: Path, dice: random.Random) -> None:
    os.truncate(path, dice.randrange(path.stat().st_size))


def lose(path: Path, other: Path, dice: random.Random) -> None:
    path.unlink()


def empty(path: Path, other: Path, dice: random.Random) -> None:
    path.write_bytes(b"")


def lengthen(path: Path, other: Path, dice: random.Random) -> None:
    path.write_bytes(path.read_bytes() + dice.randbytes(dice.randrange(1, 9)))


def take_from_another_checkpoint(path: Path, other: Path, dice: random.Random) -> None:
    shutil.copyfile(other, path)


def exchange_with_a_neighbour(path: Path, other: Path, dice: random.Random) -> None:
    neighbour = dice.choice([p for p in sorted(path.parent.iterdir()) if p != path])
    mine, theirs = path.read_bytes(), neighbour.read_bytes()
    path.write_bytes(theirs)
    neighbour.write_bytes(mine)


DAMAGES = (
    flip_a_bit, cut_off, lose, empty, lengthen, take_from_another_checkpoint, exchange_with_a_neighbour
)  # fmt: skip


def damages(folder: Path, other: Path, num: int, seed: int = 0) -> Iterator[tuple[str, Path, Callable[[], None]]]:
    """``num`` damages to the checkpoint in ``folder``: (kind, file, what does it), each kind and file equally often."""
    dice = random.Random(seed)
    names = sorted(p.name for p in folder.iterdir())
    same = {name for name in names if (folder / name).read_bytes() == (other / name).read_bytes()}
    cases = [
        (damage, name)
        for damage, name in itertools.product(DAMAGES, names)
        if not (damage is take_from_another_checkpoint and name in same)
    ]
    for number in range(num):
        damage, name = cases[number % len(cases)]
        path = folder / name
        yield damage.__name__, path, lambda d=damage, p=path: d(p, other / p.name, dice)


# ------------------------------------------------------------------------------------------------------------ checks


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_crashes(folder: Path) -> tuple[int, set[int]]:
    """Number of distinct states of the disk that were recovered from, and the steps that were found."""
    root = folder / "run"
    run = Run(root)
    num_states, found_steps = 0, set()
    for case in ("third checkpoint", "over unfinished and damaged ones"):
        shutil.rmtree(root, ignore_errors=True)
        for step in (10, 20):
            run.save(step)
        if case != "third checkpoint":
            shutil.copytree(root / "step-00000010", root / "step-00000030.partial")
            shutil.copytree(root / "step-00000010", root / "step-00000030")
        whole = {20: contents(root / "step-00000020")}
        disk = Disk(root)
        operations = record(lambda: run.save(30))
        whole[30] = contents(root / "step-00000030")
        published = next(k for k, op in enumerate(operations) if op[0] == "rename" and op[2].endswith("-00000030"))
        safe = next(k for k in range(published, len(operations)) if operations[k] == ("fsync", str(root))) + 1
        assert {op[0] for op in operations} == {"mkdir", "create", "write", "fsync", "rename", "unlink", "rmdir"}
        first_removal = next(k for k, op in enumerate(operations) if op[0] == "rename" and "step-00000010" in op[1])
        assert safe <= first_removal, "an old checkpoint went before the new one was safe"
        for done, state in crash_states(root, disk, operations):
            after = folder / "after"
            materialise(state, after)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = newest_checkpoint(after)
            assert found is not None and contents(found.path) == whole[found.step], (case, done)
            assert found.step == 30 or done < safe, (case, done)
            num_states += 1
            found_steps.add(found.step)
    return num_states, found_steps


def check_damages(folder: Path, num: int, seed: int = 0) -> dict[str, int]:
    """Damages by kind, all of them found, named, and fallen back from."""
    run, counts = Run(folder / "run", keep=3), {}
    for step in (10, 20, 30):
        run.save(step)
    sound = {path.name: contents(path) for path in (folder / "run").iterdir()}
    newest, other = folder / "run" / "step-00000030", folder / "run" / "step-00000010"
    for kind, path, damage in damages(newest, other, num, seed):
        damage()
        changed = {name for name, content in sound[newest.name].items() if contents(newest).get(name) != content}
        assert path.name in changed
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = newest_checkpoint(folder / "run")
        assert found is not None and found.step == 20, (kind, path)
        [message] = [str(w.message) for w in caught]
        assert any(str(newest / name) in message for name in changed), (kind, path, message)
        for name, content in sound[newest.name].items():
            (newest / name).write_bytes(content)
        counts[kind] = counts.get(kind, 0) + 1
    assert newest_checkpoint(folder / "run").step == 30  # type: ignore[union-attr]
    return counts
