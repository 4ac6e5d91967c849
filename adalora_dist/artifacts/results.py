"""What results.json says, whatever recipe wrote it: subjects (task, method, rows) and their scores by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adalora_dist.io.markdown import number, text

Subject = tuple[tuple[str, str], ...]
"""What scores are about, as (what, its name) pairs."""


def records_in(value: Any) -> list[Mapping[str, Any]]:
    """The records of one occasion: recipes write one, or a list of them."""
    return [record for record in (value if isinstance(value, list) else [value]) if isinstance(record, dict)]


def subject_of(record: Mapping[str, Any]) -> Subject:
    """What a record is about: its words (task, method) and its number of rows."""
    words = [(text(key), text(value)) for key, value in record.items() if isinstance(value, str)]
    return (*words, *([("rows", number(record["num_rows"]))] if "num_rows" in record else []))


def scores_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Its other numbers, those of a mapping within it too; counts become shares of ``num_rows``."""
    scores: dict[str, float] = {}
    for key, value in record.items():
        scores |= scores_of(value) if isinstance(value, dict) else {key: value}
    scores = {k: v for k, v in scores.items() if _is_number(v)}
    num_rows = scores.pop("num_rows", None)
    for count, share in (("num_correct", "accuracy"), ("num_parse_failures", "unparsed")):
        if num_rows and count in scores:
            scores[share] = scores.pop(count) / num_rows
    return scores


def _is_number(value: Any) -> bool:
    """As JSON has it; whole numbers of hundreds of digits are none, since a float cannot hold them."""
    return isinstance(value, float) or (type(value) is int and value.bit_length() <= 1000)
