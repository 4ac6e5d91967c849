"""The forms that people keep texts in, and what a row of each is: a conversation, a prompt with its completion, a text.

    messages       {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    conversations  {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    instruction    {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    prompt         {"prompt": "1 + 1 =", "completion": " 2"}
    text           {"text": "One and one is two."}

The form of a source follows from the columns of its first rows. Never imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.rows.fields import REMEDY, from_json, object_row, refuse_odd_text, shown, text_field
from adalora_dist.tasks.sft.hints import columns_hint
from adalora_dist.tasks.sft.messages import is_conversation, messages_of, tools_of

Row = Mapping[str, Any]
Columns = Mapping[str, str]
"""The column of each field of a form; an optional field has none where its own name is the column of another one."""
Content = dict[str, Any]
"""What a row is, as JSON: ``{"messages": [...], "tools"?: [...], "first"?: int}``, of which assistant turns from number
``first`` on are learnt; ``{"prompt": str, "completion": str}``; or ``{"text": str}``."""

VERSION = 3
"""Of what rows become; part of the name of what is cached."""


@dataclass(frozen=True)
class Form:
    """A form in which rows come.

    ``required`` and ``optional`` are its fields; ``parse(row, column_of, origin)`` makes the content, from the columns
    that ``column_of`` gives for the fields.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Row, Columns, str], Content]

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)

    def column_of(self, given: Columns) -> dict[str, str]:
        """The column of each field, where some are ``given``."""
        taken = set(given.values())
        return {
            field: given.get(field, field)
            for field in self.fields
            if field in given or field not in taken or field in self.required
        }


@dataclass(frozen=True)
class Reader:
    """Reads the rows of one source, which are all of one form.

    Args:
        columns: of the source's first rows.
        given: where a field has another name.
    """

    form: Form
    columns: tuple[str, ...]
    given: Columns

    def __call__(self, row: object, origin: str) -> Content:
        """The content of a row.

        Raises:
            UserError: the row cannot be used; it names ``origin`` and field.
        """
        return self.form.parse(object_row(row, origin, self.form.required), self._column_of, origin)

    @property
    def sentence(self) -> str:
        """What has been recognised: "messages (role, content); not used: id"."""
        used = set(self._column_of.values())
        renamed = [f"{field}={column}" for field, column in self.given.items() if field != column]
        unused = [column for column in self.columns if column not in used]
        parts = [f"{self.form.name}" + (f" ({_listed(renamed)})" if renamed else "")]
        return "; ".join(parts + ([f"columns not used: {_listed(unused)}"] if unused else []))

    @property
    def identity(self) -> str:
        """What its outcome depends on besides the row."""
        return json.dumps([VERSION, self.form.name, sorted(self.given.items())])

    @property
    def _column_of(self) -> dict[str, str]:
        return self.form.column_of(self.given)


def columns_of(rows: Sequence[object]) -> tuple[str, ...]:
    """The columns of rows, each once."""
    return tuple(dict.fromkeys(str(name) for row in rows if isinstance(row, Mapping) for name in row))


def recognise(rows: Sequence[object], given: Columns, where: str) -> Reader:
    """The reader for a source whose first rows these are.

    Raises:
        UserError: no form has these columns, or there is no column that ``given`` names, or one is given twice.
    """
    columns = columns_of(rows)
    if rows and not columns:
        raise UserError(
            f"{where}: its first row is {shown(rows[0])}; legal: an object with {_KNOWN}; write one JSON object per "
            "line, or an array of objects into a .json file"
        )
    for field, column in given.items():
        if column not in columns:
            raise UserError(f"{where}: no column {column}, which columns gives to {field}; it has {_listed(columns)}")
    for form in FORMS:
        if set(given) <= set(form.fields) and {given.get(field, field) for field in form.required} <= set(columns):
            _refuse_twice(form.column_of(given), where)
            return Reader(form, columns, dict(given))
    hint = columns_hint(rows, columns)
    if given:
        hint = f"--columns names fields {', '.join(given)}, which must be of one form"
    raise UserError(f"{where}: no known form has the columns {_listed(columns)}; known are {_KNOWN}; {hint}")


def _refuse_twice(column_of: Columns, where: str) -> None:
    of_column: dict[str, str] = {}
    for field, column in column_of.items():
        if column in of_column:
            raise UserError(
                f"{where}: column {column} would be both {of_column[column]} and {field}; give each its own, with "
                f"--columns {of_column[column]}={column},{field}=ANOTHER"
            )
        of_column[column] = field


# ------------------------------------------------------------------------------------------------- what a row becomes


def _conversation(field: str) -> Callable[[Row, Columns, str], Content]:
    def parse(row: Row, column_of: Columns, origin: str) -> Content:
        column = column_of[field]
        turns = _system(row, column_of, origin) + messages_of(row.get(column), column, origin)
        pairs = f"to learn the chosen replies, add --columns prompt={column},completion=chosen"
        remedy = pairs if "chosen" in row else REMEDY
        return _with_replies(turns, _tools(row, column_of, origin), origin, remedy=remedy)

    return parse


def _instruction(row: Row, column_of: Columns, origin: str) -> Content:
    instruction = text_field(row, column_of["instruction"], origin)
    given = _optional_text(row, column_of.get("input"), origin)
    turns = [
        {"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction},
        {"role": "assistant", "content": text_field(row, column_of["output"], origin)},
    ]
    return {"messages": _system(row, column_of, origin) + _history(row, column_of.get("history"), origin) + turns}


def _completion(row: Row, column_of: Columns, origin: str) -> Content:
    """Two texts stay as they are; where one side is a list of messages, both become parts of a conversation.

    A completion that begins with all of the prompt, as pairs of whole conversations do, has it once.
    """
    sides = {field: row.get(column_of[field]) for field in ("prompt", "completion")}
    if not any(isinstance(side, list | tuple | Mapping) for side in sides.values()):
        return {field: text_field(row, column_of[field], origin) for field in sides}
    prompt, completion = (
        messages_of([side] if isinstance(side, Mapping) else side, column_of[field], origin)
        if isinstance(side, list | tuple | Mapping)
        else [{"role": role, "content": text_field(row, column_of[field], origin)}]
        for (field, side), role in zip(sides.items(), ("user", "assistant"), strict=True)
    )
    first = len(prompt)
    turns = completion if completion[:first] == prompt else prompt + completion
    return _with_replies(turns, _tools(row, column_of, origin), origin, first) | {"first": first}


def _text(row: Row, column_of: Columns, origin: str) -> Content:
    return {"text": text_field(row, column_of["text"], origin)}


FORMS = (
    Form("messages", ("messages",), ("system", "tools"), _conversation("messages")),
    Form("conversations", ("conversations",), ("system", "tools"), _conversation("conversations")),
    Form("instruction, input, output", ("instruction", "output"), ("input", "system", "history"), _instruction),
    Form("prompt and completion", ("prompt", "completion"), ("tools",), _completion),
    Form("plain text", ("text",), (), _text),
)
"""In the order in which they are tried."""
_KNOWN = "; ".join(" and ".join(form.required) for form in FORMS)


def _with_replies(turns: list[Content], tools: list[Any], origin: str, first: int = 0, remedy: str = REMEDY) -> Content:
    if not any(turn["role"] == "assistant" for turn in turns[first:]):
        raise UserError(f"{origin}: the conversation has no assistant turn, from which to learn; {remedy}")
    return {"messages": turns} | ({"tools": tools} if tools else {})


def _tools(row: Row, column_of: Columns, origin: str) -> list[Any]:
    column = column_of.get("tools")
    return tools_of(row.get(column), column, origin) if column else []


def _system(row: Row, column_of: Columns, origin: str) -> list[Content]:
    text = _optional_text(row, column_of.get("system"), origin)
    return [{"role": "system", "content": text}] if text else []


def _history(row: Row, column: str | None, origin: str) -> list[Content]:
    """Turns of earlier questions with their answers, each a list of two texts; or messages."""
    pairs = from_json(row.get(column)) if column else None
    if column is None or pairs is None or pairs != pairs:  # NaN
        return []
    if is_conversation(pairs):
        return messages_of(pairs, column, origin)
    is_pairs = isinstance(pairs, list | tuple) and all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs)
    if not is_pairs:
        raise UserError(f"{origin}: field {column} is {shown(pairs)}; legal: a list of [question, answer]; {REMEDY}")
    sides = {"user": "question", "assistant": "answer"}
    turns = []
    for index, pair in enumerate(pairs):
        for (role, side), text in zip(sides.items(), pair, strict=True):
            name = f"{column}[{index}].{side}"
            turns.append({"role": role, "content": text_field({name: text}, name, origin)})
    return turns


def _optional_text(row: Row, column: str | None, origin: str) -> str:
    value = row.get(column) if column else None
    if column is None or value is None or value != value:  # NaN, as tables have it where a cell is empty
        return ""
    if not isinstance(value, str):
        raise UserError(f"{origin}: field {column} is {shown(value)}; legal: a text, or nothing; {REMEDY}")
    refuse_odd_text(value, column, origin)
    return value if value.strip() else ""


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(shown(column)[1:-1] or "''" for column in columns) or "none"
