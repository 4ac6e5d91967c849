"""What to write for ``--columns`` where no form has the columns of a source: a proposal from their names and contents.

Nothing is read by it; the user decides. Never imports torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence

from adalora_dist.tasks.rows.fields import from_json, shown
from adalora_dist.tasks.sft.messages import is_conversation

_QUESTIONS = ("instruction", "question", "query", "prompt", "problem", "input", "inputs", "user", "human")
_ANSWERS = ("output", "answer", "response", "completion", "reply", "solution", "target", "targets", "assistant", "gpt")
_FURTHER = {"input": ("input", "context"), "system": ("system", "system_prompt")}
_TEXTS = ("text", "content", "document", "body", "article", "story", "passage", "sentence")


def columns_hint(rows: Sequence[object], columns: Sequence[str]) -> str:
    """The last part of the error that no form has ``columns``, which are those of ``rows``."""
    first = next((row for row in rows if isinstance(row, Mapping)), None)
    if first is None:
        return "it has no rows"
    question, text = _first_of(_QUESTIONS, columns), _first_of(_TEXTS, columns)
    answer = _first_of(_ANSWERS, [column for column in columns if column != question])
    chats = [column for column in columns if is_conversation(first.get(column))]
    if {"chosen", "rejected"} <= set(columns):
        if not question and is_conversation(first["chosen"]):
            mapped = {"messages": "chosen"}
        else:
            mapped = {"prompt": question, "completion": "chosen"} if question else {"text": "chosen"}
        return f"pairs of replies: to learn the chosen ones, add {_flag(mapped)}"
    if chats:
        return f"conversations: add {_flag({'messages': chats[0]})}"
    if question and answer:
        free = [column for column in columns if column not in (question, answer)]
        further = {field: _first_of(names, free) for field, names in _FURTHER.items()}
        mapped = {"instruction": question, "output": answer} | {f: name for f, name in further.items() if name}
        return f"questions and answers: add {_flag(mapped)}"
    if text:
        return f"texts: add {_flag({'text': text})}"
    nested = [column for column in columns if _is_list_of_rows(first.get(column))]
    if nested and len(rows) == 1:
        return f"its one row has a list of objects, {shown(nested[0])[1:-1]}: write these, one per line"
    return "name yours with --columns instruction=QUESTION,output=ANSWER"


def _first_of(names: Iterable[str], columns: Sequence[str]) -> str:
    """The column that has the first of these names, whatever its capitals; none: an empty text."""
    plain = {column.lower(): column for column in reversed(columns)}
    return next((plain[name] for name in names if name in plain), "")


def _flag(mapped: Mapping[str, str]) -> str:
    """``--columns`` as one word for the shell, without fields that have their own names."""
    pairs = ",".join(f"{field}={column}" for field, column in mapped.items() if field != column)
    return f"--columns {shlex.quote(pairs if pairs.isprintable() else ascii(pairs)[1:-1])}"


def _is_list_of_rows(value: object) -> bool:
    value = from_json(value)
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(row, Mapping) for row in value)
