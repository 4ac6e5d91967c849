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
from adalora_dist.tasks.rows.fields import REMEDY, object_row, refuse_odd_text, shown, text_field

Row = Mapping[str, Any]
Content = dict[str, Any]
"""What a row is, as JSON: ``{"messages": [...], "tools"?: [...], "first"?: int}``, of which assistant turns from number
``first`` on are learnt; ``{"prompt": str, "completion": str}``; or ``{"text": str}``."""

VERSION = 2
"""Of what rows become; part of the name of what is cached."""
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "ai": "assistant", "bing": "assistant", "bard": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "tool_response": "tool",
    "ipython": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
"""By the words that people use."""
_CALLS = ("function_call", "tool_call")
_ROLE_KEYS, _TEXT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
"""Of a message, whichever of each it has."""
_TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Of a message: what chat templates write before its text, each under the name that it knows."""
_KEPT = ("name", "tool_call_id", *THOUGHTS)
"""Further texts of a message that chat templates know."""


@dataclass(frozen=True)
class Form:
    """A form in which rows come.

    ``required`` and ``optional`` are its fields; ``parse(row, column_of, origin)`` makes the content, from the columns
    that ``column_of`` gives for the fields.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Row, Mapping[str, str], str], Content]

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)


@dataclass(frozen=True)
class Reader:
    """Reads the rows of one source, which are all of one form.

    Args:
        columns: of the source's first rows.
        column_of: where a field has another name.
    """

    form: Form
    columns: tuple[str, ...]
    column_of: Mapping[str, str]

    def __call__(self, row: object, origin: str) -> Content:
        """The content of a row.

        Raises:
            UserError: the row cannot be used; it names ``origin`` and field.
        """
        return self.form.parse(object_row(row, origin, self.form.required), self._column_of, origin)

    @property
    def sentence(self) -> str:
        """What has been recognised: "messages (role, content); not used: id"."""
        used = {self._column_of[field] for field in self.form.fields}
        renamed = [f"{field}={column}" for field, column in self.column_of.items() if field != column]
        unused = [column for column in self.columns if column not in used]
        parts = [f"{self.form.name}" + (f" ({', '.join(renamed)})" if renamed else "")]
        return "; ".join(parts + ([f"columns not used: {', '.join(unused)}"] if unused else []))

    @property
    def identity(self) -> str:
        """What its outcome depends on besides the row."""
        return json.dumps([VERSION, self.form.name, sorted(self.column_of.items())])

    @property
    def _column_of(self) -> dict[str, str]:
        return {field: self.column_of.get(field, field) for field in self.form.fields}


def recognise(rows: Sequence[object], column_of: Mapping[str, str], where: str) -> Reader:
    """The reader for a source whose first rows these are.

    Raises:
        UserError: no form has these columns, or there is no column that ``column_of`` names.
    """
    columns = tuple(dict.fromkeys(str(name) for row in rows if isinstance(row, Mapping) for name in row))
    for field, column in column_of.items():
        if column not in columns:
            raise UserError(f"{where}: no column {column}, which columns gives to {field}; it has {_listed(columns)}")
    for form in FORMS:
        names = [column_of.get(field, field) for field in form.required]
        if set(names) <= set(columns) and set(column_of) <= set(form.fields):
            return Reader(form, columns, dict(column_of))
    known = "; ".join(" and ".join(form.required) for form in FORMS)
    hint = "name yours with --columns instruction=QUESTION,output=ANSWER"
    if {"chosen", "rejected"} <= set(columns):
        hint = "pairs of replies: to learn the chosen ones, add --columns prompt=PROMPT,completion=chosen"
    elif not rows:
        hint = "it has no rows"
    elif column_of:
        hint = f"--columns names fields {', '.join(column_of)}, which must be of one form"
    raise UserError(f"{where}: no known form has the columns {_listed(columns)}; known are {known}; {hint}")


# ------------------------------------------------------------------------------------------------- what a row becomes


def _conversation(field: str) -> Callable[[Row, Mapping[str, str], str], Content]:
    def parse(row: Row, column_of: Mapping[str, str], origin: str) -> Content:
        turns = _messages(row.get(column_of[field]), column_of[field], origin)
        return _with_replies(_system(row, column_of, origin) + turns, _tools(row, column_of, origin), origin)

    return parse


def _instruction(row: Row, column_of: Mapping[str, str], origin: str) -> Content:
    instruction = text_field(row, column_of["instruction"], origin)
    given = _optional_text(row, column_of["input"], origin)
    turns = [
        {"role": "user", "content": f"{instruction}\n\n{given}" if given else instruction},
        {"role": "assistant", "content": text_field(row, column_of["output"], origin)},
    ]
    return {"messages": _system(row, column_of, origin) + turns}


def _completion(row: Row, column_of: Mapping[str, str], origin: str) -> Content:
    """Two texts stay as they are; where one side is a list of messages, both become parts of a conversation."""
    sides = {field: row.get(column_of[field]) for field in ("prompt", "completion")}
    if not any(isinstance(side, list | tuple | Mapping) for side in sides.values()):
        return {field: text_field(row, column_of[field], origin) for field in sides}
    turns: list[Content] = []
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        column = column_of[field]
        if isinstance(sides[field], list | tuple | Mapping):
            new = _messages([sides[field]] if isinstance(sides[field], Mapping) else sides[field], column, origin)
        else:
            new = [{"role": role, "content": text_field(row, column, origin)}]
        first, turns = len(turns), turns + new
    content = _with_replies(turns, _tools(row, column_of, origin), origin, first)
    return content | {"first": first}


def _text(row: Row, column_of: Mapping[str, str], origin: str) -> Content:
    return {"text": text_field(row, column_of["text"], origin)}


FORMS = (
    Form("messages", ("messages",), ("system", "tools"), _conversation("messages")),
    Form("conversations", ("conversations",), ("system", "tools"), _conversation("conversations")),
    Form("instruction, input, output", ("instruction", "output"), ("input", "system"), _instruction),
    Form("prompt and completion", ("prompt", "completion"), ("tools",), _completion),
    Form("plain text", ("text",), (), _text),
)
"""In the order in which they are tried."""


# -------------------------------------------------------------------------------------------------------------- turns


def _messages(value: object, column: str, origin: str) -> list[Content]:
    value = _from_json(value)  # tables of text have no other way to hold a list
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{origin}: field {column} is {shown(value)}; legal: a list of messages; {REMEDY}")
    return [_message(item, f"{column}[{index}]", origin) for index, item in enumerate(value)]


def _message(item: object, field: str, origin: str) -> Content:
    if not isinstance(item, Mapping):
        raise UserError(f"{origin}: field {field} is {shown(item)}; legal: a message with role and content; {REMEDY}")
    role_key = next((key for key in _ROLE_KEYS if item.get(key) is not None), "role")
    usual = "value" if role_key == "from" else "content"
    text_key = next((key for key in _TEXT_KEYS if item.get(key) is not None), usual)
    word = item.get(role_key)
    word = word.strip().lower() if isinstance(word, str) else word
    role = ROLES.get(word) if isinstance(word, str) else None
    if role is None:
        raise UserError(
            f"{origin}: field {field}.{role_key} is {shown(item.get(role_key))}; legal: {', '.join(ROLES)}; {REMEDY}"
        )
    if item.get("weight") not in (None, 1):
        raise UserError(
            f"{origin}: field {field}.weight is {shown(item['weight'])}; legal: 1, the loss counts on every assistant "
            f"turn; {REMEDY}"
        )
    content = _content(item.get(text_key), f"{field}.{text_key}", origin)
    message: Content = {"role": role, "content": content}
    for name in _KEPT:
        if isinstance(text := item.get(name), str) and text:
            refuse_odd_text(text, f"{field}.{name}", origin)
            message[name] = text
    calls = item.get("tool_calls")
    if not calls and (call := _present(item.get("function_call"))):  # as OpenAI had it before
        calls = [{"function": call}]
    if word in _CALLS and (parsed := _parsed_calls(content)):
        # A template that has a place for calls gets them, any other one the text.
        message |= {"content": "", "tool_calls": parsed, "call_text": content}
    elif role == "assistant" and calls:
        message["tool_calls"] = _tool_calls(calls, f"{field}.tool_calls", origin)
    if not content.strip() and "tool_calls" not in message and role in ("assistant", "user"):
        what = "an assistant turn" if role == "assistant" else "a user turn"
        has = shown(item.get(text_key))
        raise UserError(f"{origin}: field {field}.{text_key} is {has}; {what} has a text; {REMEDY}")
    return message


def _content(value: object, field: str, origin: str) -> str:
    """The text of a message, of which parts are joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        refuse_odd_text(value, field, origin)
        return value
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise UserError(f"{origin}: field {field} is {shown(value)}; legal: a text, or a list of text parts; {REMEDY}")
    texts = []
    for index, part in enumerate(value):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") in _TEXT_PARTS else part
        if not isinstance(text, str):
            raise UserError(
                f"{origin}: field {field}[{index}] is {shown(part)}; legal: a part of type text, as texts are all that "
                f"is learnt here; {REMEDY}"
            )
        refuse_odd_text(text, f"{field}[{index}]", origin)
        texts.append(text)
    return "".join(texts)


def _with_replies(turns: list[Content], tools: list[Any], origin: str, first: int = 0) -> Content:
    turns = [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]
    if not any(turn["role"] == "assistant" for turn in turns[first:]):
        raise UserError(f"{origin}: the conversation has no assistant turn, from which to learn; {REMEDY}")
    return {"messages": turns} | ({"tools": tools} if tools else {})


def _system(row: Row, column_of: Mapping[str, str], origin: str) -> list[Content]:
    text = _optional_text(row, column_of["system"], origin)
    return [{"role": "system", "content": text}] if text else []


def _optional_text(row: Row, column: str, origin: str) -> str:
    value = row.get(column)
    if value is None or value != value:  # NaN, as tables have it where a cell is empty
        return ""
    if not isinstance(value, str):
        raise UserError(f"{origin}: field {column} is {shown(value)}; legal: a text, or nothing; {REMEDY}")
    refuse_odd_text(value, column, origin)
    return value if value.strip() else ""


# -------------------------------------------------------------------------------------------------------------- tools


def _tools(row: Row, column_of: Mapping[str, str], origin: str) -> list[Any]:
    """Descriptions of functions, each as ``{"type": "function", "function": ...}``."""
    value = _from_json(_present(row.get(column_of["tools"])))
    if not value:
        return []
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise UserError(f"{origin}: field {column_of['tools']} is {shown(value)}; legal: a list of functions; {REMEDY}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]


def _parsed_calls(text: str) -> list[Content]:
    """Calls that are written as JSON, ``{"name": ..., "arguments": ...}`` or a list of these; none: the text is
    another."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return []
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def _tool_calls(value: object, field: str, origin: str) -> list[Content]:
    calls = []
    for index, call in enumerate(value if isinstance(value, list | tuple) else [value]):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(
                f"{origin}: field {field}[{index}] is {shown(call)}; legal: a call with function.name; {REMEDY}"
            )
        # A text, as OpenAI has them; templates write the object.
        arguments = _from_json(_present(function.get("arguments"))) or {}
        own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}} | own)
    return calls


def _from_json(value: object) -> Any:
    """What a text has, if it is JSON; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _present(value: object) -> Any:
    """Without fields of null: tables have every field of any row in all of them."""
    if isinstance(value, Mapping):
        return {name: _present(part) for name, part in value.items() if part is not None}
    return [_present(part) for part in value] if isinstance(value, list | tuple) else value


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(shown(column)[1:-1] for column in columns) or "none"
