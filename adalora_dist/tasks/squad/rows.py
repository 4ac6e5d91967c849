"""SQuAD: questions on passages, cut into windows that overlap.

A local source is a folder ``SOURCE/{train,validation}.{jsonl,parquet}``, or one file, with rows ``{"id", "question",
"context", "answers": {"text": [...], "answer_start": [...]}}``; no texts: the passage has no answer (v2.0). A file of
SQuAD's own, one object with data, paragraphs and qas, is read as its rows; a row without an id gets one of its place.
The word ``hub`` reads rajpurkar/squad or squad_v2. Importing this file never imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adalora_dist.config.row_files import names_file
from adalora_dist.io.errors import UserError
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.fields import REMEDY, absence, from_json, object_row, refuse_odd_text, shown, text_field
from adalora_dist.tasks.rows.held_out import validation_of
from adalora_dist.tasks.rows.hub import HubData
from adalora_dist.tasks.rows.source import checked_rows, renaming, split_of
from adalora_dist.tasks.rows.token_cache import Columns, cached_columns
from adalora_dist.tasks.squad.config import SquadDataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB = {"v1.1": HubData("rajpurkar/squad"), "v2.0": HubData("rajpurkar/squad_v2")}
_FIELDS = ("id", "question", "context", "answers")
NO_SPAN = (0, 0)
"""Start and end of a window that does not hold the answer: its first token, [CLS]."""


@dataclass(frozen=True)
class Question:
    """One question; without answers it has none in its passage. ``answer_starts`` are characters of ``context``."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    answer_starts: tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """Question and part of its passage, as the model reads it."""

    question: int
    """Index of its question."""
    inputs: dict[str, list[int]]
    """What the model takes besides ``attention_mask``."""
    starts: list[int]
    """Of each token its first character in the passage; -1: not of the passage."""
    ends: list[int]
    """And the character after its last."""
    span: tuple[int, int]
    """First and last token of the question's first answer; ``NO_SPAN`` if the window does not hold all of it."""


def load_squad(data: SquadDataConfig, bad_rows: BadRows | None = None) -> tuple[list[Question], list[Question]]:
    """Questions to train on and to evaluate, all checked; ``max_train_rows`` and ``max_eval_rows`` keep the first.

    ``bad_rows`` (by default with the policy of ``data``) counts the rows left out.

    Raises:
        UserError: a file is missing, empty or unreadable, the Hub cannot be reached, or a row is not valid.
    """
    train, test, _ = load_squad_parts(data, bad_rows)
    return train, test


def load_squad_parts(
    data: SquadDataConfig, bad_rows: BadRows | None = None, validates: bool = False
) -> tuple[list[Question], list[Question], list[Question] | None]:
    """(questions to train on, to evaluate on before and after, and while training, if ``validates``).

    All questions on a passage are in one part. Of a source that is one file, the last two are the same.
    """
    bad = bad_rows or BadRows(data.bad_rows)
    train, validation = validation_of(
        data, validates, _load(data, bad, "train")[: data.max_train_rows],
        lambda name: _load(data, bad, name)[: data.max_eval_rows],
        lambda questions: (question.context for question in questions),
        lambda questions, numbers: [questions[number] for number in numbers], data.max_eval_rows,
    )  # fmt: skip
    if validation is not None and names_file(data.source):
        return train, validation, validation
    return train, _load(data, bad, "test")[: data.max_eval_rows], validation


def _load(data: SquadDataConfig, bad: BadRows, split: str) -> list[Question]:
    seen: set[str] = set()

    def parse(row: object, origin: str) -> Question:
        question = question_of(data.task, row, origin)
        if question.id in seen:  # predictions are filed by it
            raise UserError(f"{origin}: field id is {shown(question.id)}, that of an earlier row; legal: its own")
        seen.add(question.id)
        return question

    if data.source == "hub":
        hub, instead = HUB[data.task], "--data FOLDER with FOLDER/train.jsonl and FOLDER/validation.jsonl"
        hub_split = "validation" if split == "test" else split
        return checked_rows(hub.where(hub_split), hub.rows(hub_split, instead), parse, bad)
    found = split_of(Path(data.source), split, ("validation", "dev"))
    rows = (row for origin, row in found.rows() for row in _flat(row, origin))
    return checked_rows(found.where, rows, renaming(parse, data.column_of), bad)


def _flat(row: object, origin: str) -> Iterator[tuple[str, object]]:
    """The rows in a file as SQuAD publishes them, which is one object; of any other one the row itself."""
    if not (isinstance(row, Mapping) and isinstance(row.get("data"), list)):
        yield origin, row
        return
    file, number = origin.rpartition(":")[0], 0
    for article in row["data"]:
        for passage in article.get("paragraphs", ()) if isinstance(article, Mapping) else ():
            for question in passage.get("qas", ()) if isinstance(passage, Mapping) else ():
                number += 1
                own = dict(question) if isinstance(question, Mapping) else {}
                own["answers"] = own.get("answers") or {"text": [], "answer_start": []}
                yield f"{file}:{number}", {**own, "context": passage.get("context")}


def question_of(task: str, row: object, origin: str) -> Question:
    """Check one row.

    Raises:
        UserError: a field is missing or of another kind, an answer does not stand where it should, or a question of
            v1.1 has none; naming ``origin``.
    """
    row = object_row(row, origin, _FIELDS)
    row = {"id": origin, **row}
    if isinstance(row["id"], int) and not isinstance(row["id"], bool):
        row["id"] = str(row["id"])  # as JSON has keys, by which predictions are filed
    name, question, context = (text_field(row, field, origin, can_map=True) for field in _FIELDS[:3])
    given: Any = from_json(row.get("answers"))
    if isinstance(given, list) and given and all(isinstance(answer, Mapping) for answer in given):
        given = {field: [answer.get(field) for answer in given] for field in ("text", "answer_start")}
    if not isinstance(given, Mapping) or not {"text", "answer_start"} <= given.keys():
        raise UserError(
            f"{origin}: field answers must be an object with lists text and answer_start, both may be empty; it is "
            f"{shown(given)}{absence(row, 'answers', can_map=True)}"
        )
    texts, starts = given["text"], given["answer_start"]
    if not isinstance(texts, list | tuple) or not isinstance(starts, list | tuple) or len(texts) != len(starts):
        raise UserError(
            f"{origin}: field answers has text {shown(texts)} and answer_start {shown(starts)}; legal: two lists of "
            f"the same length; {REMEDY}"
        )
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{origin}: field answers has the text {shown(text)}; legal: a text; {REMEDY}")
        refuse_odd_text(text, "answers", origin)
        if isinstance(start, bool) or not isinstance(start, int):
            raise UserError(f"{origin}: field answers has the start {shown(start)}; legal: a whole number; {REMEDY}")
        if start < 0 or context[start : start + len(text)] != text:
            raise UserError(
                f"{origin}: answer {shown(text)} does not start at character {start} of the context; {REMEDY}"
            )
    if task == "v1.1" and not texts:
        raise UserError(f"{origin}: the question has no answer, which is for --task v2.0")
    return Question(name, question.strip(), context, tuple(texts), tuple(starts))


def make_windows(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    data: SquadDataConfig,
    description: str,
    show_progress: bool = True,
) -> list[Window]:
    """All windows of all questions, in order; from the cache if they are there.

    Raises:
        UserError: the tokenizer cannot tell which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} has no character offsets: use a model with a tokenizer.json")

    def encode(chunk: Sequence[tuple[Any, ...]]) -> Columns:
        return _windows_of(chunk, tokenizer, data)

    if not questions:
        return []
    items = [
        (i, q.question, q.context, *((q.answers[0], q.answer_starts[0]) if q.answers else ("", -1)))
        for i, q in enumerate(questions)
    ]
    settings = {name: getattr(data, name) for name in ("max_length", "doc_stride", "max_question_length")}
    columns = cached_columns(items, tokenizer, settings, encode, description, show_progress)
    names = [name for name in ("input_ids", "token_type_ids") if name in columns]
    return [
        Window(
            columns["question"][row][0],
            {name: columns[name][row] for name in names},
            columns["starts"][row],
            columns["ends"][row],
            (columns["span"][row][0], columns["span"][row][1]),
        )
        for row in range(len(columns["question"]))
    ]


def _windows_of(items: Sequence[tuple[Any, ...]], tokenizer: PreTrainedTokenizerBase, data: SquadDataConfig) -> Columns:
    columns: Columns = {"question": [], "starts": [], "ends": [], "span": []}
    asked = tokenizer(
        [item[1] for item in items],
        add_special_tokens=False,
        truncation=True,
        max_length=data.max_question_length,
        return_offsets_mapping=True,
    )["offset_mapping"]
    encoded = tokenizer(
        [item[1][: offsets[-1][1]] if offsets else "" for item, offsets in zip(items, asked, strict=True)],
        [item[2] for item in items],
        truncation="only_second",
        max_length=data.max_length,
        stride=data.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    for name in ("input_ids", "token_type_ids"):
        if name in encoded:
            columns[name] = encoded[name]
    for row, item in enumerate(encoded["overflow_to_sample_mapping"]):
        index, _, _, answer, first = items[item]
        is_passage = [part == 1 for part in encoded.sequence_ids(row)]
        offsets = encoded["offset_mapping"][row]
        starts = [start if inside else -1 for inside, (start, _) in zip(is_passage, offsets, strict=True)]
        ends = [end if inside else -1 for inside, (_, end) in zip(is_passage, offsets, strict=True)]
        columns["question"].append([index])
        columns["starts"].append(starts)
        columns["ends"].append(ends)
        columns["span"].append(list(_find_span(starts, ends, first, first + len(answer)) if first >= 0 else NO_SPAN))
    return columns


def _find_span(starts: Sequence[int], ends: Sequence[int], first: int, after: int) -> tuple[int, int]:
    """Tokens that cover the characters ``first`` to ``after``, if the window has all of them."""
    tokens = [token for token, start in enumerate(starts) if start >= 0]
    if not tokens or starts[tokens[0]] > first or ends[tokens[-1]] < after:
        return NO_SPAN
    begin = max(token for token in tokens if starts[token] <= first)
    return begin, min(token for token in tokens if ends[token] >= after)
