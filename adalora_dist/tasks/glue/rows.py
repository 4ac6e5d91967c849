"""The eight GLUE tasks: what their rows look like, where they lie, how they are scored.

A local source is a folder ``SOURCE/TASK/{train,dev}.{jsonl,parquet}`` (MNLI: dev_matched and dev_mismatched; TASK also
as SST-2, STS-B). A row has the task's texts, under the names of the public data set or as sentence (sentence1,
sentence2), and ``label``: a class number, for STS-B a number from 0 to 5. The word ``hub`` reads nyu-mll/glue. Test
sets have no public labels: scores are those of the development sets, as in the paper. Importing this file never imports
torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from adalora_dist.tasks.glue.config import GlueDataConfig
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.fields import number_field, object_row, text_field
from adalora_dist.tasks.rows.files import TRAIN, task_folder
from adalora_dist.tasks.rows.hub import HubData
from adalora_dist.tasks.rows.source import checked_rows, local_split
from adalora_dist.tasks.rows.token_cache import Columns, cached_columns
from adalora_dist.tasks.rows.tokens import refuse_no_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """One task.

    ``evaluation_sets`` maps the name of each set to the names of its file, the Hub's first. One label: regression.
    """

    texts: tuple[str, ...]
    num_labels: int
    metrics: tuple[str, ...]
    evaluation_sets: Mapping[str, tuple[str, ...]]


_DEV = {"dev": ("validation", "dev")}
_MATCHED = {
    "matched": ("validation_matched", "dev_matched"),
    "mismatched": ("validation_mismatched", "dev_mismatched"),
}
TASKS = {
    "cola": Task(("sentence",), 2, ("matthews",), _DEV),
    "sst2": Task(("sentence",), 2, ("accuracy",), _DEV),
    "mrpc": Task(("sentence1", "sentence2"), 2, ("accuracy", "f1"), _DEV),
    "stsb": Task(("sentence1", "sentence2"), 1, ("pearson", "spearman"), _DEV),
    "qqp": Task(("question1", "question2"), 2, ("accuracy", "f1"), _DEV),
    "mnli": Task(("premise", "hypothesis"), 3, ("accuracy",), _MATCHED),
    "qnli": Task(("question", "sentence"), 2, ("accuracy",), _DEV),
    "rte": Task(("sentence1", "sentence2"), 2, ("accuracy",), _DEV),
}
"""Texts in the order in which the model reads them; metrics as the paper reports them."""

SIMILARITY = (0, 5)
"""Least and most of STS-B's label."""


@dataclass(frozen=True)
class LabelledText:
    """One sentence or pair of sentences with its class number, or its similarity."""

    texts: tuple[str, ...]
    label: float


def load_glue(
    data: GlueDataConfig, bad_rows: BadRows | None = None
) -> tuple[list[LabelledText], dict[str, list[LabelledText]]]:
    """Training rows, and the rows of each evaluation set by its name; both are checked.

    ``max_train_rows`` and ``max_eval_rows`` keep the first rows. ``bad_rows`` (by default with the policy of ``data``)
    counts the rows left out.

    Raises:
        UserError: a file is missing, empty or unreadable, the Hub cannot be reached, or a row is not valid.
    """
    task, bad = TASKS[data.task], bad_rows or BadRows(data.bad_rows)
    train = _load(data, bad, "train", TRAIN)[: data.max_train_rows]
    sets = {
        name: _load(data, bad, files[0], files)[: data.max_eval_rows] for name, files in task.evaluation_sets.items()
    }
    return train, sets


def hub_data(task: str) -> HubData:
    """Where a task lies on the Hub."""
    return HubData("nyu-mll/glue", task)


def _load(data: GlueDataConfig, bad: BadRows, hub_split: str, file_names: tuple[str, ...]) -> list[LabelledText]:
    parse = partial(labelled_text, TASKS[data.task])
    if data.source == "hub":
        instead = f"--data FOLDER with FOLDER/{data.task}/train.jsonl and FOLDER/{data.task}/dev.jsonl"
        hub = hub_data(data.task)
        return checked_rows(hub.where(hub_split), hub.rows(hub_split, instead), parse, bad)
    split = local_split(task_folder(data.source, data.task, tuple(TASKS)), file_names)
    return checked_rows(split.where, split.rows(), parse, bad)


def labelled_text(task: Task, row: object, origin: str) -> LabelledText:
    """Check one row.

    Raises:
        UserError: a text or the label is missing or of another kind, or the label is out of its range, naming
            ``origin``.
    """
    row = object_row(row, origin, (*task.texts, "label"))
    plain = ("sentence",) if len(task.texts) == 1 else ("sentence1", "sentence2")
    names = task.texts if all(name in row for name in task.texts) else plain
    texts = tuple(text_field(row, name, origin) for name in names)
    if task.num_labels == 1:
        return LabelledText(texts, number_field(row, "label", origin, *SIMILARITY))
    most, note = task.num_labels - 1, "; test sets have no labels"
    return LabelledText(texts, number_field(row, "label", origin, 0, most, whole=True, note=note))


def encode_texts(
    examples: Sequence[LabelledText],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    description: str,
    show_progress: bool = True,
) -> list[dict[str, list[int]]]:
    """What the model takes of each row, at most ``max_length`` tokens, unpadded; from the cache if it is there.

    Raises:
        UserError: a text has no tokens.
    """

    def encode(chunk: Sequence[tuple[str, ...]]) -> Columns:
        columns = list(zip(*chunk, strict=True))
        encoded = tokenizer(
            *(list(column) for column in columns), truncation=True, max_length=max_length, return_attention_mask=False
        )
        return {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}

    columns = cached_columns(
        [e.texts for e in examples], tokenizer, {"max_length": max_length}, encode, description, show_progress
    )
    refuse_no_tokens(columns["input_ids"], lambda row: " ".join(examples[row].texts))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
