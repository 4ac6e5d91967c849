"""A few generated texts for the console, each below what it was made from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_LONGEST = 400  # characters of a text


def shown_texts(sources: Sequence[str], texts: Iterable[str], count: int) -> str:
    """The first ``count`` texts; nothing to show: ""."""
    lines = []
    for source, text in zip(sources[:count], texts, strict=False):
        lines += [f"\nOf: {_cut(source)}", f"Written now: {_cut(text)}"]
    return "\n".join(lines)


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
