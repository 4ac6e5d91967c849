"""Where rows of one's own lie: ``--data`` words to splits of files and of the Hub. Never imports torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.rows.bad_rows import Rows
from adalora_dist.tasks.rows.fields import shown
from adalora_dist.tasks.rows.files import READ, TRAIN, LocalSplit, data_files, entries, split_in
from adalora_dist.tasks.rows.hub import HubData
from adalora_dist.tasks.rows.table import Split

if TYPE_CHECKING:
    from datasets import Dataset

HUB = "hub:"
VALIDATION = ("validation", "valid", "eval", "dev", "test")
"""Names of a folder's validation split, in the order in which they are taken."""
_NUM_FIRST = 20
_NUM_NAMED = 6


@dataclass(frozen=True)
class HubSplit:
    """One split of a data set on the Hub, loaded: what :class:`LocalSplit` is of files."""

    data: HubData
    name: str
    loaded: Dataset

    @property
    def where(self) -> str:
        return self.data.where(self.name)

    def rows(self) -> Rows:
        for number, row in enumerate(self.loaded, start=1):
            yield f"{self.where}:{number}", row

    def identity(self) -> Iterator[bytes]:
        yield f"{self.where} {self.loaded._fingerprint}".encode()


@dataclass(frozen=True)
class Source:
    """A word of ``--data``: what it names, and how often its rows count in an epoch."""

    name: str
    weight: float = 1.0

    @property
    def is_hub(self) -> bool:
        return self.name.startswith(HUB)

    def training(self) -> Split:
        """Its training rows: a file; a folder's train split, or else all of its files; the Hub's train split.

        A clone of a repository of the Hub is its folder ``data``.

        Raises:
            UserError: there is no such thing, or it cannot be read.
        """
        if self.is_hub:
            return self._of_hub(None)
        return self._of_files()[0]

    def validation(self, name: str = "") -> Split | None:
        """The split called ``name``; without one, a folder's own validation split, None where it has none.

        Raises:
            UserError: there is no split of this name.
        """
        if self.is_hub:
            return self._of_hub(name) if name else None
        if name:
            found = split_in(self._folder, (name,)) if self._folder.is_dir() else None
            if found is None:
                raise UserError(
                    f"eval_split={name}: {self.name} has no such split; give a file, a folder, hub:ID:SPLIT, or the "
                    "name of a split that all of the data has"
                )
            return found
        return self._of_files()[1]

    def remarks(self, used: Collection[Path]) -> str:
        """Which files of a folder are trained on where none is called train, and what is not read; none to say: "".

        Args:
            used: all files that are read.
        """
        if self.is_hub or not self._folder.is_dir():
            return ""
        reached = {path for file in used for path in (file, *file.parents)}
        left = [path for path in entries(self._folder) if path not in reached]
        rows = () if split_in(self._folder, TRAIN) else self._of_files()[0].files
        parts = [f"all of {_names(rows)}"] if len(rows) > 1 else []
        return "; ".join(parts + ([f"not read: {_names(left)}"] if left else []))

    @property
    def _folder(self) -> Path:
        path = Path(self.name)
        inner = path / "data"
        return inner if inner.is_dir() and not (split_in(path, TRAIN) or data_files(path)) else path

    def _of_hub(self, split: str | None) -> HubSplit:
        path, _, own = self.name.removeprefix(HUB).partition(":")
        if not path:
            raise UserError(f"data={self.name}: it names no data set; write hub:NAMESPACE/NAME[:SPLIT]")
        data, name = HubData(path), split or own or "train"
        return HubSplit(data, name, data.load(name, "--data FILE_OR_FOLDER"))

    def _of_files(self) -> tuple[LocalSplit, LocalSplit | None]:
        path = Path(self.name)
        if path.is_file():
            if not path.name.endswith(READ):
                is_plain = ".txt" in path.name
                hint = 'write {"text": ...} for each text, one per line' if is_plain else "rename it as what it is"
                known = f"its form is not known by its name; legal: {', '.join(READ)}"
                raise UserError(f"data={self.name}: {known}; {hint}")
            return LocalSplit(path.name, (path,)), None
        if not path.is_dir():
            hint = " (the Hub's: --data hub:ID)" if self.name.count("/") == 1 else ""
            raise UserError(f"data={self.name}: no such file or folder{hint}; give one, or hub:ID[:SPLIT]")
        path = self._folder
        validation = split_in(path, VALIDATION)
        if train := split_in(path, TRAIN):
            return train, validation
        held_out = validation.files if validation else ()
        files = tuple(file for file in data_files(path) if file not in held_out)
        if not files:
            inner = [folder for folder in entries(path) if folder.is_dir()]
            hint = f"; give its folders, as --data {inner[0]} ... (it has {_names(inner)})" if inner else ""
            raise UserError(f"data={self.name}: the folder has no files with rows; legal: {', '.join(READ)}{hint}")
        return LocalSplit(path.name, files), validation


def parse_source(word: str) -> Source:
    """``a.jsonl``, ``a.jsonl=2`` or ``hub:ID:train=0.5``. A name that exists is a name, whatever stands in it.

    Raises:
        UserError: the weight is no number above 0.
    """
    name, mark, weight = word.rpartition("=")
    if not mark or Path(word).exists():
        return Source(word)
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not (name and 0 < number < math.inf):
        raise UserError(f"data={word}: the weight {weight!r} must be a number > 0, as in {name or 'a.jsonl'}=2")
    return Source(name, number)


def validation_splits(sources: Sequence[Source], eval_split: str) -> list[Split]:
    """What ``eval_split`` names, or the folders' own validation splits; none: a share has to be held out.

    Raises:
        UserError: as :meth:`Source.training` and :meth:`Source.validation`.
    """
    named = Source(eval_split)
    if eval_split and (named.is_hub or Path(eval_split).exists() or eval_split.endswith(READ)):
        if not named.is_hub and Path(eval_split).is_dir() and (own := named.validation()):
            return [own]
        return [named.training()]
    found = [source.validation(eval_split) for source in sources]
    return [split for split in found if split is not None]


def first_rows(split: Split) -> list[object]:
    """Of those that can be read.

    Raises:
        UserError: there are rows, and not one of them can be read; or the file cannot.
    """
    rows: list[object] = []
    problem: UserError | None = None
    for _, row in split.rows():
        if isinstance(row, UserError):
            problem = problem or row
        else:
            rows.append(row)
        if len(rows) == _NUM_FIRST:
            break
    if problem and not rows:
        raise problem
    return rows


def _names(paths: Sequence[Path]) -> str:
    names = [shown(path.name)[1:-1] + ("/" if path.is_dir() else "") for path in paths[:_NUM_NAMED]]
    return ", ".join(names) + (f", ... ({len(paths)})" if len(paths) > _NUM_NAMED else "")
