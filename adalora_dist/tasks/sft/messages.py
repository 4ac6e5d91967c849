"""Messages of a conversation, as different tools write them: who speaks, what is said, which functions are called.

Never imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.rows.fields import REMEDY, from_json, refuse_odd_text, shown

Content = dict[str, Any]

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


def messages_of(value: object, column: str, origin: str) -> list[Content]:
    """The turns of a list of messages, or of its JSON, each with ``role`` and ``content``; without empty system turns.

    Raises:
        UserError: it is no such list, or a message cannot be used; it names ``origin`` and field.
    """
    value = from_json(value)  # tables of text have no other way to hold a list
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{origin}: field {column} is {shown(value)}; legal: a list of messages; {REMEDY}")
    turns = [_message(item, f"{column}[{index}]", origin) for index, item in enumerate(value)]
    return [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]


def is_conversation(value: object) -> bool:
    """Whether it looks like a list of messages, or the JSON of one."""
    value = from_json(value)
    first = value[0] if isinstance(value, list | tuple) and value else None
    return isinstance(first, Mapping) and any(isinstance(first.get(key), str) for key in _ROLE_KEYS)


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


# -------------------------------------------------------------------------------------------------------------- tools


def tools_of(value: object, column: str, origin: str) -> list[Any]:
    """Descriptions of functions, each as ``{"type": "function", "function": ...}``; none where there is no value.

    Raises:
        UserError: it is no list of objects.
    """
    value = from_json(_present(value))
    if not value:
        return []
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise UserError(f"{origin}: field {column} is {shown(value)}; legal: a list of functions; {REMEDY}")
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
        arguments = from_json(_present(function.get("arguments"))) or {}
        own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}} | own)
    return calls


def _present(value: object) -> Any:
    """Without fields of null: tables have every field of any row in all of them."""
    if isinstance(value, Mapping):
        return {name: _present(part) for name, part in value.items() if part is not None}
    return [_present(part) for part in value] if isinstance(value, list | tuple) else value
