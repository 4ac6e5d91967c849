"""Commonsense questions: reading and checking rows of instruction, input, output and answer.

A local source is a folder ``SOURCE/TASK/{train,test}.{jsonl,parquet}``; the word ``hub`` reads the public data sets
(see ``hub.py``). Every row is checked on loading, so load everything before a model is touched. Importing this file
never imports torch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.commonsense.config import COMMONSENSE_TASKS, CommonsenseDataConfig
from adalora_dist.tasks.commonsense.hub import hub_rows
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.files import SUFFIXES, file_rows

Split = Literal["train", "test"]

# Only the test split has stand-ins: a folder with train and dev files is common, and dev rows are held out as well.
FILE_NAMES: dict[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "validation", "dev")}
FIELDS = ("instruction", "input", "output", "answer")

# For rows without an "Answer format:" line. ARC is not here: its questions have three, four or five answers.
FIXED_CHOICES: dict[str, tuple[str, ...]] = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "siqa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4"),
}
_ANSWER_FORMAT = re.compile(r"^Answer format:[ \t]*(.+?)[ \t]*$", re.MULTILINE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One question with its reply.

    ``answer`` is one of ``choices`` and stands in ``output`` as a whole word; ``origin`` is ``file:row``, row 1 first.
    """

    instruction: str
    input: str
    output: str
    answer: str
    choices: tuple[str, ...]
    task: str
    origin: str

    def output_for(self, choice: str) -> str:
        """The reply that gives ``choice``: ``output`` with the last whole-word ``answer`` in it replaced."""
        *_, last = _whole_words(self.answer, self.output)
        return self.output[: last.start()] + choice + self.output[last.end() :]


def resolve_tasks(data: CommonsenseDataConfig) -> tuple[str, ...]:
    """The tasks to use: those asked for, or all that the source has; in the order of ``COMMONSENSE_TASKS``.

    Looks only at file names, for every task and both splits.

    Raises:
        UserError: the source or a file is missing, or is there twice.
    """
    if data.source == "hub":
        return tuple(task for task in COMMONSENSE_TASKS if not data.tasks or task in data.tasks)
    existing = _tasks_in(data.source)
    tasks = tuple(task for task in COMMONSENSE_TASKS if task in (data.tasks or existing))
    if not tasks:
        raise UserError(
            f"data={data.source!r}: no task folder found; expected one or more of {_join(COMMONSENSE_TASKS)}"
        )
    for task in tasks:
        find_file(data.source, task, "train")
        find_file(data.source, task, "test")
    return tasks


def load_tasks(
    data: CommonsenseDataConfig, bad_rows: BadRows | None = None
) -> tuple[list[Example], dict[str, list[Example]]]:
    """Training rows of all tasks, joined in task order, and evaluation rows by task.

    ``max_train_rows`` and ``max_eval_rows`` keep the first rows of each task; all rows are checked nevertheless.
    ``bad_rows`` (by default with the policy of ``data``) counts the rows left out.

    Raises:
        UserError: anything that ``resolve_tasks`` or ``load_task`` refuses.
    """
    tasks, bad = resolve_tasks(data), bad_rows or BadRows(data.bad_rows)
    train = [row for task in tasks for row in load_task(data.source, task, "train", bad)[: data.max_train_rows]]
    return train, {task: load_task(data.source, task, "test", bad)[: data.max_eval_rows] for task in tasks}


def load_task(source: str, task: str, split: Split, bad_rows: BadRows | None = None) -> list[Example]:
    """All rows of one split of one task.

    Split ``test`` falls back to a validation or dev file where no test file exists, with a warning that names it; on
    the Hub it is the split that has labels.

    Raises:
        UserError: a file is missing, empty or unreadable, the Hub cannot be reached, or a row is not valid and
            ``bad_rows`` does not let it be left out (it does not by default).
    """
    bad, parse = bad_rows or BadRows("error"), partial(_example, task)
    if source == "hub":
        return list(bad.usable(hub_rows(task, split), parse))
    path = find_file(source, task, split)
    if path.stem not in (split, "train"):
        logger.warning("%s/%s has no test file: evaluating on %s", source, task, path.name)
    examples = list(bad.usable(file_rows(path), parse))
    if not examples:
        usable = "usable rows" if bad.counts[str(path)] else "rows"
        raise UserError(f"{path}: the file has no {usable}; remove the folder of {task} or fill the file")
    return examples


def find_file(source: str, task: str, split: Split) -> Path:
    """The file that holds a split of a task; for test files, names are tried in the order test, validation, dev.

    Raises:
        UserError: no such file, or the same name with two suffixes.
    """
    existing = _tasks_in(source)
    folder = Path(source) / task
    for name in FILE_NAMES[split]:
        found = [path for suffix in SUFFIXES if (path := folder / (name + suffix)).is_file()]
        if len(found) > 1:
            raise UserError(f"{folder}: both {found[0].name} and {found[1].name} exist; remove one of them")
        if found:
            return found[0]
    wanted = _join([name + suffix for name in FILE_NAMES[split] for suffix in SUFFIXES])
    raise UserError(f"{folder}: no {split} file; looked for {wanted}; tasks in {source}: {_join(existing) or 'none'}")


def _tasks_in(source: str) -> list[str]:
    if not source or not Path(source).is_dir():
        raise UserError(
            f"data={source!r}: no such folder; give a folder with TASK/train.jsonl and TASK/test.jsonl, or the word hub"
        )
    return [task for task in COMMONSENSE_TASKS if (Path(source) / task).is_dir()]


def _example(task: str, row: object, origin: str) -> Example:
    if not isinstance(row, Mapping):
        raise UserError(f"{origin}: the row is a {type(row).__name__}; legal: an object with fields {_join(FIELDS)}")
    for field in FIELDS:
        if field not in row:
            raise UserError(f"{origin}: field {field} is missing; every row needs {_join(FIELDS)}")
        if not isinstance(row[field], str):
            raise UserError(f"{origin}: field {field} is {row[field]!r}; legal: a string; put it in quotes")
    instruction, answer, output = row["instruction"], row["answer"], row["output"]
    if not instruction.strip():
        raise UserError(f"{origin}: field instruction is empty; write the question or remove the row")
    choices = _choices(instruction, task, origin)
    if answer not in choices:
        raise UserError(f"{origin}: field answer is {answer!r}; legal: {_join(choices)}; correct the row or remove it")
    if next(_whole_words(answer, output), None) is None:
        raise UserError(
            f"{origin}: field output is {output!r}, without the answer; write 'the correct answer is {answer}'"
        )
    return Example(instruction, row["input"], output, answer, choices, task, origin)


def _choices(instruction: str, task: str, origin: str) -> tuple[str, ...]:
    lines = _ANSWER_FORMAT.findall(instruction)
    choices = tuple(lines[-1].split("/")) if lines else FIXED_CHOICES.get(task, ())
    if len(choices) < 2 or "" in choices or len(set(choices)) < len(choices):
        found = f"has the line 'Answer format: {lines[-1]}'" if lines else "has no line 'Answer format: ...'"
        raise UserError(
            f"{origin}: field instruction {found}; end it with two or more names: 'Answer format: answer1/answer2'"
        )
    return choices


def _whole_words(word: str, text: str) -> Iterator[re.Match[str]]:
    return re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text)


def _join(names: Sequence[str]) -> str:
    return ", ".join(names)
