"""Markdown out of values that nobody vouches for: whatever they hold stays text, and on its line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def line(value: object) -> str:
    """Without line breaks and other characters that do not print."""
    return "".join(c if c.isprintable() else " " for c in str(value)).strip()


def text(value: object) -> str:
    """Words without any sign that Markdown or HTML would act on."""
    return re.sub(r"[^\w .,:+/-]", "", line(value)).replace("://", ": //")


def code(value: object) -> str:
    """A code span; backquotes become apostrophes, and bars (which end a table's cell) slashes."""
    return f"`{line(value).replace('`', chr(39)).replace('|', '/') or ' '}`"


def fenced(content: str, language: str) -> str:
    """A block of code whose fence is longer than any in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", content)), default=0))
    return f"{fence}{language}\n{content}\n{fence}"


def number(value: Any) -> str:
    """Integers with thousands separators, others with four digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "not known"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def setting(value: Any) -> str:
    """A value of a configuration as code: lists word by word, ``None`` as the default that it stands for."""
    if isinstance(value, list):
        return " ".join(code(item) for item in value) or "none"
    return "default" if value is None else code(str(value).lower() if isinstance(value, bool) else value)


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """One column per key, its cells Markdown already; a column that is empty in every row is left out."""
    columns = [key for key in rows[0] if any(row.get(key) for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row.get(key, "") for key in columns] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
