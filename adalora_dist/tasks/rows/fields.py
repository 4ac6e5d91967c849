"""Fields of one row, checked: what tokenizers, losses and metrics take, and in one line what they would not.

Every error begins with the row's origin, ``file:row``, and names the field with what stands in it.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from adalora_dist.io.errors import UserError

_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother, _SHOWN.maxlong = 2, 80, 80, 40
REMEDY = "correct or remove the row, or leave out all such rows with --bad-rows skip"


def shown(value: object) -> str:
    """A value for an error message: one line of plain characters, however large or deep the value is."""
    return _SHOWN.repr(value).encode("ascii", "backslashreplace").decode()


def object_row(row: object, origin: str, names: Sequence[str]) -> Mapping[str, Any]:
    """The row, which must be an object; ``names`` are its fields, for the error.

    Raises:
        UserError: it is a list, a text, a number or nothing.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{origin}: the row is a {type(row).__name__}; legal: an object with {', '.join(names)}")
    return row


def text_field(row: Mapping[str, Any], name: str, origin: str, can_map: bool = False) -> str:
    """A text with something in it.

    Args:
        can_map: the recipe has --columns, by which the field can have another column; for the error.

    Raises:
        UserError: there is no such field, or it is no text, empty, or not Unicode (:func:`refuse_odd_text`).
    """
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        has = absence(row, name, can_map)
        raise UserError(f"{origin}: field {name} is {shown(value)}{has}; legal: a text; {REMEDY}")
    refuse_odd_text(value, name, origin)
    return value


def absence(row: Mapping[str, Any], name: str, can_map: bool = False) -> str:
    """For an error: that the row has no such column, but others; an empty text where it has it."""
    remedy = f"; --columns {name}=COLUMN if it has another name" if can_map else ""
    return "" if name in row else f" (no column {name}; the row has {names_of(row)}{remedy})"


def refuse_odd_text(text: str, name: str, origin: str) -> None:
    """Raise if tokenizers would fail on the text, or stop in the middle of it.

    Raises:
        UserError: it has half of a surrogate pair, which is no character, or a NUL, at which some tokenizers end.
    """
    at = text.find("\0")
    what = "a NUL"
    if at < 0:
        try:
            text.encode()
            return
        except UnicodeEncodeError as error:
            at, what = error.start, f"half of a surrogate pair, {shown(text[error.start])}"
    raise UserError(f"{origin}: field {name} has {what} at character {at}; legal: Unicode text without NUL; {REMEDY}")


def number_field(
    row: Mapping[str, Any], name: str, origin: str, least: float, most: float, whole: bool = False, note: str = ""
) -> float:
    """A number from ``least`` to ``most``; a truth value is none, nor is NaN.

    Args:
        whole: 1.0 will do, 0.5 will not.
        note: behind the legal range, in the error.

    Raises:
        UserError: there is no such field, or it is no such number.
    """
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        has = absence(row, name)
        raise UserError(f"{origin}: field {name} is {shown(value)}{has}; legal: a number; {REMEDY}")
    if not least <= value <= most or (whole and value != int(value)):  # NaN is not between anything
        raise UserError(f"{origin}: field {name} is {shown(value)}; legal: {least:g} to {most:g}{note}; {REMEDY}")
    return float(value)


def from_json(value: object) -> Any:
    """What a text has, if it is JSON, as lists and objects are in tables of text; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def names_of(row: Mapping[str, Any]) -> str:
    """The first columns of a row, for an error message."""
    names = [n if isinstance(n, str) and n.isascii() and n.isidentifier() else shown(n) for n in list(row)[:8]]
    return ", ".join([*names, "..."] if len(row) > 8 else names) or "none"
