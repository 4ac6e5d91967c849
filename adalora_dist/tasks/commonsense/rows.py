"""Commonsense questions: reading and checking rows of instruction, input, output and answer.

A local source is a folder ``SOURCE/TASK/{train,test}.{jsonl,parquet}``, TASK also as LLM-Adapters spells it (ARC-Easy,
social_i_qa) or any other name; ``SOURCE/{train,test}...``; or one file. The word ``hub`` reads the public data sets
(see ``hub.py``). A row may also have question, choices and answer, and is then put into words as those of ARC are.
Every row is checked on loading, so load everything before a model is touched. Importing this file never imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from adalora_dist.config.row_files import names_file
from adalora_dist.io.errors import UserError
from adalora_dist.tasks.commonsense.config import COMMONSENSE_TASKS, CommonsenseDataConfig
from adalora_dist.tasks.commonsense.hub import HUB_TASKS, choice_row, hub_rows, hub_split
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.fields import REMEDY, absence, from_json, object_row, refuse_odd_text, shown, text_field
from adalora_dist.tasks.rows.files import TRAIN, LocalSplit, split_in, task_folders
from adalora_dist.tasks.rows.held_out import validation_of
from adalora_dist.tasks.rows.source import checked_rows, renaming, split_of

ALIASES = {"socialiqa": "siqa", "obqa": "openbookqa", "arce": "arc_easy", "arcc": "arc_challenge"}
"""Other names of task folders; see :func:`adalora_dist.tasks.rows.files.task_folders`."""
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
_ANSWER_FORMAT = re.compile(r"^Answer format:[ \t]*(.+?)[ \t\r]*$", re.MULTILINE)


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
        return _with_answer(self.output, self.answer, choice)


@lru_cache(maxsize=4096)  # outputs are few and short, as are answers
def _with_answer(output: str, answer: str, choice: str) -> str:
    *_, last = _whole_words(answer, output)
    return output[: last.start()] + choice + output[last.end() :]


def resolve_tasks(data: CommonsenseDataConfig) -> tuple[str, ...]:
    """The tasks to use: those asked for, or all that the source has; in the order of ``COMMONSENSE_TASKS``.

    Looks only at file names, for every task and both splits.

    Raises:
        UserError: the source or a file is missing, or is there twice.
    """
    if data.source == "hub":
        return tuple(task for task in COMMONSENSE_TASKS if not data.tasks or task in data.tasks)
    existing = _tasks_in(data.source)
    asked = data.tasks or existing
    tasks = (*(task for task in COMMONSENSE_TASKS if task in asked), *(t for t in asked if t not in COMMONSENSE_TASKS))
    if not tasks:
        raise UserError(
            f"data={data.source!r}: no task folder found; expected one or more of {_join(COMMONSENSE_TASKS)}"
        )
    for task in tasks:
        find_task(data.source, task, "train")
        if not names_file(data.source):
            find_task(data.source, task, "test")
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
    train, test, _ = load_tasks_and_validation(data, bad_rows)
    return train, test


def load_tasks_and_validation(
    data: CommonsenseDataConfig, bad_rows: BadRows | None = None, validates: bool = False
) -> tuple[list[Example], dict[str, list[Example]], dict[str, list[Example]]]:
    """As :func:`load_tasks`, and rows by task to evaluate on while training, if ``validates``.

    Of a source that is one file, these are those before and after, too.
    """
    bad, train = bad_rows or BadRows(data.bad_rows), list[Example]()
    test: dict[str, list[Example]] = {}
    validation: dict[str, list[Example]] = {}
    for task in resolve_tasks(data):

        def read(split: str, limit: int | None = data.max_eval_rows, task: str = task) -> list[Example]:
            return load_task(data.source, task, split, bad, data.column_of)[:limit]

        kept, held = validation_of(
            data, validates, read("train", data.max_train_rows), read,
            lambda rows: (f"{row.instruction}\n{row.input}" for row in rows),
            lambda rows, numbers: [rows[number] for number in numbers], data.max_eval_rows,
        )  # fmt: skip
        train += kept
        validation |= {} if held is None else {task: held}
        test[task] = held if held is not None and names_file(data.source) else read("test")
    return train, test, validation


def load_task(
    source: str,
    task: str,
    split: str,
    bad_rows: BadRows | None = None,
    column_of: Mapping[str, str] | None = None,
) -> list[Example]:
    """All rows of one split of one task.

    Split ``test`` falls back to a validation or dev file where no test file exists, with a warning that names it; on
    the Hub it is the split that has labels.

    Raises:
        UserError: a file is missing, empty or unreadable, the Hub cannot be reached, or a row is not valid and
            ``bad_rows`` does not let it be left out (it does not by default).
    """
    bad, parse = bad_rows or BadRows("error"), renaming(partial(_example, task), column_of or {})
    if source == "hub":
        where = HUB_TASKS[task].where(hub_split(task, split))
        return checked_rows(where, hub_rows(task, split), parse, bad)
    found = find_task(source, task, split)
    return checked_rows(found.where, found.rows(), parse, bad)


def find_task(source: str, task: str, split: str) -> LocalSplit:
    """The files that hold a split of a task; for test files, names are tried in the order test, validation, dev.

    Raises:
        UserError: no such file, or the same name in two forms; it names the tasks that there are.
    """
    existing = _tasks_in(source)
    if Path(source).is_file() and task not in existing:
        raise UserError(f"{task}: {source} is one file, and one task of its own name: set --tasks {_join(existing)}")
    try:
        return split_of(existing.get(task, Path(source) / task), split)
    except UserError as error:
        raise UserError(f"{task}: no {split} file: {error}; tasks in {source}: {_join(existing) or 'none'}") from None


def _tasks_in(source: str) -> dict[str, Path]:
    """Where tasks lie: those of the eight; if there are none, all folders with training rows; or the source itself."""
    where = Path(source)
    if names_file(source):
        return {where.name.partition(".")[0]: where}
    if not source or not where.is_dir():
        raise UserError(
            f"data={source!r}: no such folder; give a folder with TASK/train.jsonl and TASK/test.jsonl, or the word hub"
        )
    if found := task_folders(source, COMMONSENSE_TASKS, ALIASES):
        return found
    if split_in(where, TRAIN):
        return {where.resolve().name: where}
    return {folder.name: folder for folder in sorted(where.iterdir()) if folder.is_dir() and split_in(folder, TRAIN)}


def _example(task: str, row: object, origin: str) -> Example:
    row = object_row(row, origin, FIELDS)
    if "choices" in row and "instruction" not in row:
        row = _in_words(row, origin)
    elif not {"choices", "instruction", "output"} & row.keys():
        raise UserError(f"{origin}: field choices is None{absence(row, 'choices', can_map=True)}; {REMEDY}")
    for field in FIELDS:
        if field not in row:
            raise UserError(f"{origin}: field {field} is missing; every row needs {_join(FIELDS)}")
        if not isinstance(row[field], str):
            raise UserError(f"{origin}: field {field} is {shown(row[field])}; legal: a string; {REMEDY}")
        refuse_odd_text(row[field], field, origin)
    instruction, answer, output = row["instruction"], row["answer"], row["output"]
    if not instruction.strip():
        raise UserError(f"{origin}: field instruction is empty; write the question or remove the row")
    choices = _choices(instruction, task, origin)
    if answer not in choices:
        legal = _join([shown(choice)[1:-1] for choice in choices[:8]])
        raise UserError(f"{origin}: field answer is {shown(answer)}; legal: {legal}; {REMEDY}")
    if next(_whole_words(answer, output), None) is None:
        raise UserError(
            f"{origin}: field output is {shown(output)}, without the answer; write 'the correct answer is {answer}'"
        )
    return Example(instruction, row["input"], output, answer, choices, task, origin)


def _in_words(row: Mapping[str, Any], origin: str) -> Mapping[str, Any]:
    """A row of question, choices and answer as one of instruction, input, output and answer.

    Choices are a list of texts, or ``{"text": [...], "label": [...]}``. The answer is the text of one, its label, its
    letter (A: the first), or its number, a number and no text, counted from 0. Labels that are numbers are those.
    """
    question, answer = text_field(row, "question", origin, can_map=True), row.get("answer")
    given: Any = from_json(row["choices"])
    labels: list[Any] = []
    if isinstance(given, Mapping):
        of_rows = given.get("label")
        labels = list(of_rows) if isinstance(of_rows, list | tuple | str) else []
        given = given.get("text")
    texts = list(given) if isinstance(given, list | tuple) else []
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{origin}: field choices is {shown(row['choices'])}; legal: two texts or more; {REMEDY}")
    for text in texts:
        refuse_odd_text(text, "choices", origin)
    letters = [chr(ord("A") + index) for index in range(min(len(texts), 26))]
    number = -1
    if isinstance(answer, int) and not isinstance(answer, bool):
        are_numbered = any(isinstance(label, int) for label in labels)
        number = answer if not are_numbered else labels.index(answer) if labels.count(answer) == 1 else -1
    elif isinstance(answer, str):
        for names in (texts, [str(label) for label in labels], letters):
            if names.count(answer) == 1:
                number = names.index(answer)
                break
    if not 0 <= number < len(texts):
        legal = f"one of the {len(texts)} choices, its letter, or its number from 0 on"
        has = absence(row, "answer", can_map=True)
        raise UserError(f"{origin}: field answer is {shown(answer)}{has}; legal: {legal}; {REMEDY}")
    lead = f"Please choose the correct answer to the question: {question.strip()}"
    return choice_row(lead, "answer", texts, number)


def _choices(instruction: str, task: str, origin: str) -> tuple[str, ...]:
    lines = _ANSWER_FORMAT.findall(instruction)
    choices = tuple(lines[-1].split("/")) if lines else FIXED_CHOICES.get(task, ())
    if len(choices) < 2 or "" in choices or len(set(choices)) < len(choices):
        found = (
            f"has the line 'Answer format: {shown(lines[-1])[1:-1]}'" if lines else "has no line 'Answer format: ...'"
        )
        raise UserError(
            f"{origin}: field instruction {found}; end it with two or more names: 'Answer format: answer1/answer2'"
        )
    return choices


def _whole_words(word: str, text: str) -> Iterator[re.Match[str]]:
    return re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text)


def _join(names: Iterable[str]) -> str:
    return ", ".join(names)
