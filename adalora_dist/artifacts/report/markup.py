"""HTML out of values that nobody vouches for: whatever they hold stays text."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from adalora_dist.io.errors import printable

_LONGEST_TEXT = 4000
"""Characters of a text of many lines."""


def said(value: Any, max_characters: int = 200) -> str:
    """A value as text on one line, escaped; also between double quotes of an attribute."""
    return html.escape(printable(value, max_characters))


def breakable(name: str) -> str:
    """An escaped name of a module or a path, which a narrow page may break within."""
    return re.sub(r"([./_])", r"\1<wbr>", name)


def lines(value: str) -> str:
    """A text of many lines, escaped; line breaks stay, what else does not print is shown as Python would write it."""
    return "\n".join(said(line, _LONGEST_TEXT) for line in value[:_LONGEST_TEXT].split("\n")) + (
        " ..." if len(value) > _LONGEST_TEXT else ""
    )


def number(value: float | None, digits: int = 4) -> str:
    """Whole numbers with thousands separators, others with ``digits`` significant digits; None: a dash."""
    if value is None:
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def mean_and_sd(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± standard deviation (n - 1) of two or more values."""
    mean, sd = moments(values)
    return f"{number(mean, digits)} ± {number(sd, 2)}"


def moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1; 0 of a single value)."""
    mean = sum(values) / len(values)
    return mean, (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table whose cells are HTML already; the first of each row is its header. It scrolls within the page."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}"><table class="{kind}">'
        f"<caption><span>{caption}</span></caption>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    )


def folded(summary: str, content: str) -> str:
    """What is shown on demand."""
    return f"<details><summary>{summary}</summary>\n{content}\n</details>"
