"""Local data: where a split lies, and its rows with their origins for error messages. Never imports torch.

A split is one file, NAME.jsonl, .json, .parquet, .arrow, .csv or .tsv (of JSON and tables of text also .gz and .zst);
or such files in a folder NAME, as ``save_to_disk`` of Hugging Face's datasets leaves them, too; or shards
NAME-00000-of-00002.parquet. Paths are names, never patterns: whatever a folder is called, it alone is read.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adalora_dist.config.row_files import READ as READ
from adalora_dist.config.row_files import names_file
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import opened
from adalora_dist.tasks.rows.bad_rows import Rows
from adalora_dist.tasks.rows.read import file_rows, refuse_zeros

TRAIN, TEST = ("train",), ("test", "validation", "dev")
"""Names of a split. Only the test split has stand-ins: a folder with train and dev files is common, and dev rows are
held out as well."""
_SHARD = re.compile(r"-(\d+)-of-(\d+)")
_OF_DATASETS = ("dataset_info.json", "dataset_dict.json", "state.json")
"""What Hugging Face's ``save_to_disk`` writes beside rows; the first two are nobody else's."""


@dataclass(frozen=True)
class LocalSplit:
    """One split in a local folder: its files in order, and which of the names asked for it has."""

    name: str
    files: tuple[Path, ...]

    @property
    def where(self) -> str:
        """For error messages: the file, or the folder of several."""
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)

    def rows(self) -> Rows:
        """The rows of all files, one after the other: see :func:`file_rows`."""
        for file in self.files:
            yield from file_rows(file)

    def identity(self) -> Iterator[bytes]:
        """What the rows and their origins depend on: the names of the files, and the SHA-256 of each."""
        for path in self.files:
            refuse_zeros(path)
            yield os.fsencode(path.absolute()) + b"\0"
            with opened(path) as file:
                yield hashlib.file_digest(file, "sha256").digest()


def task_folders(source: str, tasks: Sequence[str], aliases: Mapping[str, str] | None = None) -> dict[str, Path]:
    """The folders of tasks in ``source``, by task, in the order of ``tasks``.

    Case, dashes and underscores do not count: ARC-Easy is arc_easy, SST-2 is sst2.

    Args:
        aliases: other names, in small letters without dashes and underscores, and the task that each stands for.

    Raises:
        UserError: two folders are one task's, or ``source`` cannot be listed.
    """
    known = {_plain(task): task for task in tasks} | dict(aliases or {})
    found: dict[str, Path] = {}
    for path in entries(Path(source)):
        task = known.get(_plain(path.name))
        if task is None or not path.is_dir():
            continue
        if task in found:
            raise UserError(f"{source}: both {found[task].name} and {path.name} hold {task}; remove one of them")
        found[task] = path
    return {task: found[task] for task in tasks if task in found}


def task_folder(source: str, task: str, tasks: Sequence[str]) -> Path:
    """Where one task's splits lie in ``source``: its folder (:func:`task_folders`), the one file that ``source`` is, or
    ``source`` itself, if that has a train split and no folder of the task; if there is none of these, its usual place.
    """
    where = Path(source)
    if names_file(source):
        return where
    found = task_folders(source, (task, *tasks)) if where.is_dir() else {}
    usual = found.get(task, where / task)
    return where if where.is_dir() and not usual.is_dir() and split_in(where, TRAIN) else usual


def find_split(folder: Path, names: Sequence[str]) -> LocalSplit:
    """The split in ``folder``: that of the first of ``names`` which is there.

    Raises:
        UserError: no such folder or split, the same name in two forms, or shards are missing.
    """
    if not folder.is_dir():
        raise UserError(f"data: no folder {folder}; it must hold {names[0]}.jsonl or {names[0]}.parquet")
    if found := split_in(folder, names):
        return found
    listed = entries(folder)
    wanted = ", ".join(name + suffix for name in names for suffix in READ[:2])
    others = ", ".join(READ[2:])
    holds = ", ".join(ascii(path.name)[1:-1] for path in listed[:8]) or "nothing"
    raise UserError(
        f"{folder}: none of {wanted} exists, nor with {others}, nor a folder {names[0]} of such files (it holds "
        f"{holds}{', ...' if len(listed) > 8 else ''}); put the split there under one of these names"
    )


def split_in(folder: Path, names: Sequence[str], suffixes: Sequence[str] = READ) -> LocalSplit | None:
    """As :func:`find_split`, of files with these suffixes; None where there is no such split."""
    listed = entries(folder)
    for name in names:
        if files := _files_of(folder, name, listed, suffixes):
            return LocalSplit(name, tuple(files))
    return None


def data_files(folder: Path, suffixes: Sequence[str] = READ) -> list[Path]:
    """All files of rows that lie in a folder itself, by name.

    Raises:
        UserError: it cannot be listed.
    """
    return [path for path in entries(folder) if path.is_file() and path.name.endswith(tuple(suffixes))]


def entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted by name, without what systems hide there (.DS_Store, _SUCCESS), and without what
    ``save_to_disk`` says of its rows."""
    try:
        found = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
    except OSError as error:
        raise UserError(f"data: {folder} cannot be listed ({error.strerror}); let it be read") from error
    names = {path.name for path in found}
    apart = _OF_DATASETS if _OF_DATASETS[0] in names else _OF_DATASETS[:2]
    return [path for path in found if path.name not in apart]


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


def _files_of(folder: Path, name: str, listed: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    forms = [[path] for suffix in suffixes if (path := folder / (name + suffix)).is_file()]
    if (folder / name).is_dir():
        files = [path for path in entries(folder / name) if path.is_file()]
        forms += [[file for file in files if file.name.endswith(suffix)] for suffix in suffixes]
    for suffix in suffixes:
        if shards := _shards(name, suffix, listed):
            forms.append(shards)
    forms = [files for files in forms if files]
    if len(forms) > 1:
        first, second = (files[0].relative_to(folder) for files in forms[:2])
        raise UserError(f"{folder}: both {first} and {second} exist; remove one of them")
    return forms[0] if forms else []


def _shards(name: str, suffix: str, listed: Sequence[Path]) -> list[Path]:
    """NAME-00000-of-00002 and the next, in order."""
    found: dict[int, Path] = {}
    total = 0
    for path in listed:
        if not (path.name.startswith(name) and path.name.endswith(suffix) and path.is_file()):
            continue
        if shard := _SHARD.fullmatch(path.name[len(name) : -len(suffix)]):
            found[int(shard[1])] = path
            total = max(total, int(shard[2]))
    missing = [number for number in range(total) if number not in found]
    if missing or len(found) > total:
        some = next(iter(found.values()))
        raise UserError(
            f"{some}: of its {total} shards {len(found)} are there, number {missing[0] if missing else total} is "
            "missing; fetch all of them"
        )
    return [found[number] for number in range(total)]
