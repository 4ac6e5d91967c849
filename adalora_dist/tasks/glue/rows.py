"""The eight GLUE tasks, and tasks of one's own: what their rows look like, where they lie, how they are scored.

A local source is a folder ``SOURCE/TASK/{train,dev}.{jsonl,parquet}`` (MNLI: dev_matched and dev_mismatched; TASK also
as SST-2, STS-B). A row has the task's texts, under the names of the public data set or as sentence (sentence1,
sentence2), and ``label``: a class number, for STS-B a number from 0 to 5. The word ``hub`` reads nyu-mll/glue. Test
sets have no public labels: scores are those of the development sets, as in the paper. Tasks of one's own are read by
``own.py``. Importing this file never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from adalora_dist.config.row_files import names_file
from adalora_dist.tasks.glue.config import GlueDataConfig
from adalora_dist.tasks.glue.own import LabelledText as LabelledText
from adalora_dist.tasks.glue.own import OwnTask
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.fields import number_field, object_row, text_field
from adalora_dist.tasks.rows.files import task_folder
from adalora_dist.tasks.rows.held_out import validation_of
from adalora_dist.tasks.rows.hub import HubData
from adalora_dist.tasks.rows.source import checked_rows, local_split, renaming, split_of
from adalora_dist.tasks.rows.token_cache import Columns, cached_columns
from adalora_dist.tasks.rows.tokens import refuse_no_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """One task.

    ``evaluation_sets`` maps the name of each set to the names of its file, the Hub's first. One label: regression.
    ``classes`` are the names of the labels, by their numbers.
    """

    texts: tuple[str, ...]
    num_labels: int
    metrics: tuple[str, ...]
    evaluation_sets: Mapping[str, tuple[str, ...]]
    classes: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What the configuration of a model for this task says of it, whatever its files say of their own task."""
        if self.num_labels == 1:
            return {"num_labels": 1, "problem_type": "regression"}
        kind = {"num_labels": self.num_labels, "problem_type": "single_label_classification"}
        numbers = {name: number for number, name in enumerate(self.classes)}
        return kind | {"id2label": dict(enumerate(self.classes)), "label2id": numbers}


_DEV = {"dev": ("validation", "dev")}
_OWN = {"dev": ("validation", "dev", "test")}
_MATCHED = {
    "matched": ("validation_matched", "dev_matched"),
    "mismatched": ("validation_mismatched", "dev_mismatched"),
}
TASKS = {
    "cola": Task(("sentence",), 2, ("matthews",), _DEV, ("unacceptable", "acceptable")),
    "sst2": Task(("sentence",), 2, ("accuracy",), _DEV, ("negative", "positive")),
    "mrpc": Task(("sentence1", "sentence2"), 2, ("accuracy", "f1"), _DEV, ("not_equivalent", "equivalent")),
    "stsb": Task(("sentence1", "sentence2"), 1, ("pearson", "spearman"), _DEV),
    "qqp": Task(("question1", "question2"), 2, ("accuracy", "f1"), _DEV, ("not_duplicate", "duplicate")),
    "mnli": Task(("premise", "hypothesis"), 3, ("accuracy",), _MATCHED, ("entailment", "neutral", "contradiction")),
    "qnli": Task(("question", "sentence"), 2, ("accuracy",), _DEV, ("entailment", "not_entailment")),
    "rte": Task(("sentence1", "sentence2"), 2, ("accuracy",), _DEV, ("entailment", "not_entailment")),
}
"""Texts in the order in which the model reads them; metrics as the paper reports them."""

SIMILARITY = (0, 5)
"""Least and most of STS-B's label."""


class GlueRows(NamedTuple):
    """What a run trains and is evaluated on."""

    task: Task
    train: list[LabelledText]
    sets: dict[str, list[LabelledText]]
    """To evaluate on before and after the training, by name."""
    validation: list[LabelledText] | None = None
    """To evaluate on while training."""


def load_glue(
    data: GlueDataConfig, bad_rows: BadRows | None = None
) -> tuple[list[LabelledText], dict[str, list[LabelledText]]]:
    """Training rows, and the rows of each evaluation set by its name; both are checked.

    ``max_train_rows`` and ``max_eval_rows`` keep the first rows. ``bad_rows`` (by default with the policy of ``data``)
    counts the rows left out.

    Raises:
        UserError: a file is missing, empty or unreadable, the Hub cannot be reached, or a row is not valid.
    """
    rows = load_glue_rows(data, bad_rows)
    return rows.train, rows.sets


def load_glue_rows(data: GlueDataConfig, bad: BadRows | None = None, validates: bool = False) -> GlueRows:
    """As :func:`load_glue`, with the task, and the rows to evaluate on while training, if ``validates``.

    Of a source that is one file, these are those before and after, too.
    """
    bad, own = bad or BadRows(data.bad_rows), OwnTask(data) if data.is_own else None
    parse = partial(labelled_text, TASKS[data.task]) if own is None else renaming(own, data.column_of)

    def read(split: str, names: tuple[str, ...] = (), limit: int | None = data.max_eval_rows) -> list[LabelledText]:
        return _load(data, bad, split, names, parse)[:limit]

    train = read("train", limit=data.max_train_rows)
    task = TASKS[data.task] if own is None else Task(own.texts, own.close(), own.metrics, _OWN, own.classes)
    train, validation = validation_of(
        data, validates, train, read, lambda rows: ("\n".join(row.texts) for row in rows),
        lambda rows, numbers: [rows[number] for number in numbers], data.max_eval_rows,
    )  # fmt: skip
    if validation is not None and names_file(data.source):
        sets = {"dev": validation}
    else:
        sets = {name: read(files[0], files) for name, files in task.evaluation_sets.items()}
    if own is not None:
        own.say_scale(train)
        train, sets = own.numbered(train), {name: own.numbered(rows) for name, rows in sets.items()}
        validation = None if validation is None else own.numbered(validation)
    return GlueRows(task, train, sets, validation)


def _load(
    data: GlueDataConfig,
    bad: BadRows,
    split: str,
    names: tuple[str, ...],
    parse: Callable[[object, str], LabelledText],
) -> list[LabelledText]:
    """Args:
    split: as :func:`~adalora_dist.tasks.rows.source.split_of` takes it, or one of the Hub.
    names: of the files, where the split may have several names.
    """
    if data.source == "hub":
        instead = f"--data FOLDER with FOLDER/{data.task}/train.jsonl and FOLDER/{data.task}/dev.jsonl"
        hub = hub_data(data.task)
        return checked_rows(hub.where(split), hub.rows(split, instead), parse, bad)
    where = task_folder(data.source, data.task, tuple(TASKS))
    found = local_split(where, names) if names else split_of(where, split)
    return checked_rows(found.where, found.rows(), parse, bad)


def hub_data(task: str) -> HubData:
    """Where a task lies on the Hub."""
    return HubData("nyu-mll/glue", task)


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

    if not examples:
        return []
    columns = cached_columns(
        [e.texts for e in examples], tokenizer, {"max_length": max_length}, encode, description, show_progress
    )
    refuse_no_tokens(columns["input_ids"], lambda row: " ".join(examples[row].texts))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
