"""Local data files: which file holds a split, and reading it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from adalora_dist.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

# Only the test split has stand-ins: a folder with train and dev files is common, and dev rows are held out as well.
FILE_NAMES: dict[str, tuple[str, ...]] = {"train": ("train",), "test": ("test", "validation", "dev")}
SUFFIXES = (".jsonl", ".parquet")

logger = logging.getLogger(__name__)


def split_file(folder: Path, split: Literal["train", "test"]) -> Path:
    """The file of a split; without a test file, that of validation or dev rows, with a warning that names it.

    Raises:
        UserError: no such folder or file, or the same name with two suffixes.
    """
    if not folder.is_dir():
        raise UserError(f"data: {folder} is no folder; give one with train.jsonl and test.jsonl (or .parquet)")
    for name in FILE_NAMES[split]:
        found = [path for suffix in SUFFIXES if (path := folder / (name + suffix)).is_file()]
        if len(found) > 1:
            raise UserError(f"{folder}: both {found[0].name} and {found[1].name} exist; remove one of them")
        if found:
            if name not in ("train", "test"):
                logger.warning("%s has no test file: evaluating on %s", folder, found[0].name)
            return found[0]
    wanted = ", ".join(name + suffix for name in FILE_NAMES[split] for suffix in SUFFIXES)
    raise UserError(f"{folder}: no {split} file; looked for {wanted}")


def read_table(path: Path) -> Dataset:
    """All rows of a JSON Lines or Parquet file, on disk in the cache of ``datasets``.

    Raises:
        UserError: the file cannot be read, or is empty.
    """
    import datasets

    kind = "json" if path.suffix == ".jsonl" else "parquet"
    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train")
    except Exception as error:  # of many kinds: from the file system, pyarrow, and datasets itself
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(
            f"{path} cannot be read ({reason}): write one JSON object with the same fields per line, or Parquet"
        ) from error
