"""Documents and their summaries: XSum and CNN/DailyMail from the Hub, or local files, to rows of tokens.

A local source is a folder ``SOURCE/TASK/{train,test}.{jsonl,parquet}`` with the columns document and summary; the word
``hub`` reads the public data sets; an empty source is the built-in reports. Reading and tokenising go through
``datasets``: both are kept in its cache (``HF_DATASETS_CACHE``), and rows stay on disk until a batch needs them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.files import file_rows, find_data_file, read_table
from adalora_dist.tasks.summarization.config import SummarizationDataConfig
from adalora_dist.tasks.summarization.demo import demo_reports

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "test"]

# Only the test split has stand-ins: a folder with train and dev files is common, and dev rows are held out as well.
FILE_NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "validation", "dev")}

logger = logging.getLogger(__name__)


class HubTask(NamedTuple):
    """Where a task lives on the Hub, and its two columns."""

    path: str
    name: str | None
    document: str
    summary: str


HUB_TASKS = {
    "xsum": HubTask("EdinburghNLP/xsum", None, "document", "summary"),
    "cnn_dailymail": HubTask("abisee/cnn_dailymail", "3.0.0", "article", "highlights"),
}


def load_summaries(data: SummarizationDataConfig, bad_rows: BadRows | None = None) -> dict[Split, Dataset]:
    """Both splits, with the columns document and summary, in the order of the source.

    ``max_train_rows`` and ``max_eval_rows`` keep the first rows. ``bad_rows`` (by default with the policy of ``data``)
    counts those left out because one of the two has no text.

    Raises:
        UserError: a file or a column is missing, a file cannot be read, the Hub cannot be reached, a row is not valid,
            or no row is left.
    """
    bad = bad_rows or BadRows(data.bad_rows)
    return {
        "train": _load(data, bad, "train", data.max_train_rows),
        "test": _load(data, bad, "test", data.max_eval_rows),
    }


def encode_summaries(rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: SummarizationDataConfig) -> Dataset:
    """Add the columns input_ids (document), labels (summary), and their lengths in tokens, num_source and num_targets.

    Both are cut on their right to ``max_source_length`` and ``max_target_length``, special tokens included.
    """

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        sources = tokenizer(batch["document"], truncation=True, max_length=data.max_source_length)["input_ids"]
        labels = tokenizer(text_target=batch["summary"], truncation=True, max_length=data.max_target_length)
        targets = labels["input_ids"]
        return {
            "input_ids": sources,
            "labels": targets,
            "num_source": [len(source) for source in sources],
            "num_targets": [len(target) for target in targets],
        }

    # A fast tokenizer remembers how it was called last, and datasets' cache is keyed by its whole state.
    encode({"document": ["a"], "summary": ["a"]})
    return rows.map(encode, batched=True, desc="tokenise")


def digest_of_summaries(rows: Dataset) -> str:
    """SHA-256 of the tokens and labels of all rows, as :func:`encode_summaries` made them; read without a list of them.

    The same for equal rows, wherever they lie and however they are cut into files.
    """
    digest = hashlib.sha256()
    for table in rows.select_columns(["input_ids", "labels"]).with_format("arrow").iter(1000):
        for column in table.columns:
            digest.update(column.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype("<i8").tobytes())
    return digest.hexdigest()


def _load(data: SummarizationDataConfig, bad: BadRows, split: Split, max_rows: int | None) -> Dataset:
    from datasets import Dataset

    path = None
    if not data.source:
        rows, columns = Dataset.from_list([report._asdict() for report in demo_reports(split)]), ("document", "summary")
        origin = "built-in reports"
    elif data.source == "hub":
        task = HUB_TASKS[data.task]
        rows, columns, origin = _hub_rows(task, data.task, split), (task.document, task.summary), task.path
    else:
        path = find_data_file(Path(data.source) / data.task, FILE_NAMES[split])
        if path.stem != split:
            logger.warning("%s has no test file: evaluating on %s", path.parent, path.name)
        rows, columns, origin = _table(path, bad), ("document", "summary"), str(path)
    for column in columns:
        if column not in rows.column_names:
            raise UserError(
                f"{origin}: no column {column} (it has {', '.join(rows.column_names)}); every row needs "
                f"{' and '.join(columns)}"
            )
    rows = rows.select_columns(list(columns)).rename_columns(
        {old: new for old, new in zip(columns, ("document", "summary"), strict=True) if old != new}
    )
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    kept = rows.filter(_has_text, desc="check rows")
    if len(kept) < len(rows):  # which, and why
        numbered = file_rows(path) if path else ((f"{origin}:{n}", row) for n, row in enumerate(rows, start=1))
        for _ in bad.usable(islice(numbered, max_rows), _checked):
            continue
    if not len(kept):
        raise UserError(f"{origin}: no row with a document and a summary; give at least 1 row")
    return kept


def _table(path: Path, bad: BadRows) -> Dataset:
    """All rows of a local file; if they do not make one table, those that can be used, one by one.

    Raises:
        UserError: the file cannot be read, or what is wrong with its first bad row.
    """
    from datasets import Dataset

    try:
        return read_table(path)
    except UserError as error:
        usable = list(bad.usable(file_rows(path), _checked))
        if not usable:
            raise error
        return Dataset.from_list(usable)


def _checked(row: object, origin: str) -> dict[str, str]:
    """The row, if it can be used.

    Raises:
        UserError: a field has no text; naming ``origin``.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{origin}: the row is a {type(row).__name__}; legal: an object with document and summary")
    for field in ("document", "summary"):
        if not _is_text(row.get(field)):
            raise UserError(
                f"{origin}: field {field} is {row.get(field)!r}; legal: a text; correct or remove the row, or leave "
                "out all such rows with --bad-rows skip"
            )
    return {field: row[field] for field in ("document", "summary")}


def _has_text(row: dict[str, Any]) -> bool:
    return _is_text(row["document"]) and _is_text(row["summary"])


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _hub_rows(task: HubTask, name: str, split: Split) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(task.path, task.name, split=split)
    except Exception as error:  # whatever HTTP client, cache or parser failed, the user can do the same about it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data='hub': cannot load {task.path} {split} ({reason}); check the network and HF_HUB_OFFLINE, or use "
            f"local files: --data FOLDER with FOLDER/{name}/train.jsonl and FOLDER/{name}/test.jsonl"
        ) from error
