"""Documents and their summaries: XSum and CNN/DailyMail from the Hub, or local files, to rows of tokens.

A local source is a folder ``SOURCE/TASK/{train,test}.{jsonl,parquet}`` or ``SOURCE/{train,test}...``, or one file, with
the columns document and summary, or others that ``columns`` names; the word ``hub`` reads the public data sets; an
empty source is the built-in reports. Rows stay on disk until a batch needs them:
those of local files in this package's cache, those of the Hub and all tokens in the caches of ``datasets``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from adalora_dist.config.row_files import names_file
from adalora_dist.io.digest import digest_of
from adalora_dist.io.errors import UserError
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.fields import object_row, text_field
from adalora_dist.tasks.rows.files import task_folder
from adalora_dist.tasks.rows.held_out import validation_of
from adalora_dist.tasks.rows.hub import HubData
from adalora_dist.tasks.rows.source import built_in, refuse_nothing, renaming, split_of
from adalora_dist.tasks.rows.table import checked_table
from adalora_dist.tasks.rows.token_cache import rules_of
from adalora_dist.tasks.rows.tokens import refuse_no_tokens
from adalora_dist.tasks.summarization.config import SummarizationDataConfig
from adalora_dist.tasks.summarization.demo import demo_reports

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_VERSION = 1
"""Of what texts become; part of the name of what is cached."""
COLUMNS = ("document", "summary")


class HubColumns(NamedTuple):
    """Where a task lives on the Hub, and its two columns."""

    data: HubData
    document: str
    summary: str


TASKS = {
    "xsum": HubColumns(HubData("EdinburghNLP/xsum"), "document", "summary"),
    "cnn_dailymail": HubColumns(HubData("abisee/cnn_dailymail", "3.0.0"), "article", "highlights"),
}


def load_summaries(
    data: SummarizationDataConfig, bad_rows: BadRows | None = None, validates: bool = False
) -> dict[str, Dataset]:
    """The splits train and test, with the columns document and summary, in the order of the source.

    With ``validates``, or where the source is one file, also the split validation: rows that are evaluated on while
    training. Of one file it is the test split, too.

    ``max_train_rows`` and ``max_eval_rows`` keep the first rows. ``bad_rows`` (by default with the policy of ``data``)
    counts those left out because one of the two has no text.

    Raises:
        UserError: a file or a column is missing, a file cannot be read, the Hub cannot be reached, a row is not valid,
            or no row is left.
    """
    bad = bad_rows or BadRows(data.bad_rows)
    train, validation = validation_of(
        data, validates, _load(data, bad, "train", data.max_train_rows),
        lambda name: _load(data, bad, name, data.max_eval_rows),
        lambda rows: (row for part in rows.iter(1000) for row in cast(Any, part)["document"]),
        lambda rows, numbers: rows.select(numbers), data.max_eval_rows,
    )  # fmt: skip
    splits = {"train": train} | ({} if validation is None else {"validation": validation})
    if validation is not None and names_file(data.source):
        return splits | {"test": validation}
    return splits | {"test": _load(data, bad, "test", data.max_eval_rows)}


def encode_summaries(rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: SummarizationDataConfig) -> Dataset:
    """Add the columns input_ids (document), labels (summary), and their lengths in tokens, num_source and num_targets.

    Both are cut on their right to ``max_source_length`` and ``max_target_length``, special tokens included.

    Raises:
        UserError: a text has no tokens.
    """

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        sources = tokenizer(batch["document"], truncation=True, max_length=data.max_source_length)["input_ids"]
        labels = tokenizer(text_target=batch["summary"], truncation=True, max_length=data.max_target_length)
        targets = labels["input_ids"]
        for name, tokens in (("document", sources), ("summary", targets)):
            refuse_no_tokens(tokens, batch[name].__getitem__)
        return {
            "input_ids": sources,
            "labels": targets,
            "num_source": [len(source) for source in sources],
            "num_targets": [len(target) for target in targets],
        }

    how = [_VERSION, data.max_source_length, data.max_target_length, rows._fingerprint]
    # The last: mBART's and NLLB's target language, which summaries begin or end with.
    rules = [type(tokenizer).__name__, rules_of(tokenizer), tokenizer(text_target="a")["input_ids"]]
    name = digest_of([json.dumps([how, rules], default=str).encode()])[:32]
    return rows.map(encode, batched=True, new_fingerprint=name, desc="tokenise")


def _load(data: SummarizationDataConfig, bad: BadRows, split: str, max_rows: int | None) -> Dataset:
    from datasets import Dataset

    if data.source == "hub":
        return _from_hub(data.task, split, bad, max_rows)
    if data.source:
        found = split_of(task_folder(data.source, data.task, tuple(TASKS)), split)
        how = json.dumps(sorted(data.column_of.items())) if data.columns else ""
        return checked_table(found, COLUMNS, renaming(_checked, data.column_of), bad, max_rows, how)
    return Dataset.from_list([report._asdict() for report in demo_reports(built_in(split))[:max_rows]])


def _from_hub(name: str, split: str, bad: BadRows, max_rows: int | None) -> Dataset:
    """The first ``max_rows`` rows, without those that cannot be used."""
    hub, *columns = TASKS[name]
    rows = hub.load(split, f"--data FOLDER with FOLDER/{name}/train.jsonl and FOLDER/{name}/test.jsonl")
    for column in columns:
        if column not in rows.column_names:
            raise UserError(
                f"{hub.where(split)}: no column {column} (it has {', '.join(rows.column_names)}); the data set has "
                "changed: use local files with --data FOLDER"
            )
    renamed = {old: new for old, new in zip(columns, COLUMNS, strict=True) if old != new}
    rows = rows.select_columns(columns).rename_columns(renamed)
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    kept = rows.filter(_is_usable, desc="check rows")
    if len(kept) < len(rows):  # which, and why
        numbered = ((f"{hub.where(split)}:{number}", row) for number, row in enumerate(rows, start=1))
        for _ in bad.usable(numbered, _checked):
            continue
    if not len(kept):
        refuse_nothing(hub.where(split), len(rows), bad)
    return kept


def _checked(row: object, origin: str) -> dict[str, str]:
    """The two texts of a row that can be used.

    Raises:
        UserError: a field has no text; naming ``origin``.
    """
    row = object_row(row, origin, COLUMNS)
    return {field: text_field(row, field, origin, can_map=True) for field in COLUMNS}


def _is_usable(row: dict[str, Any]) -> bool:
    try:
        _checked(row, "")
    except UserError:
        return False
    return True
