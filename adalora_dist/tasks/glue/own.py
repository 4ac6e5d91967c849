"""Classification and regression of one's own: one or two columns of texts, a column of labels, any classes."""

from __future__ import annotations

import logging
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.glue.config import GlueDataConfig
from adalora_dist.tasks.rows.fields import REMEDY, absence, names_of, object_row, refuse_odd_text, shown, text_field

logger = logging.getLogger(__name__)

_FAR = 10.0
"""From 0. The largest labels of a published task are 5 (STS-B)."""
TEXTS = (
    *(("text", "text2"), ("text1", "text2"), ("sentence1", "sentence2"), ("question1", "question2")),
    *(("premise", "hypothesis"), ("question", "sentence"), ("text",), ("sentence",)),
)
"""Columns that are taken for the texts; the first of these that a row has all of."""


_WHOLE = re.compile(r"-?\d{1,18}")
_WRITTEN_WHOLE = re.compile(r"(-?\d{1,18})\.0+")
"""A whole number as a table has it whose column once had a gap: 1.0."""
_FRACTION = re.compile(r"-?\d*\.\d+")


@dataclass(frozen=True)
class LabelledText:
    """One sentence or pair of sentences with its class number, or the number that belongs to it.

    As long as the classes are not known, ``name`` is that of the class. ``origin`` is ``file:row``.
    """

    texts: tuple[str, ...]
    label: float
    name: str = ""
    origin: str = ""


class OwnTask:
    """Reads the rows of a task: training rows first, which say what its columns and classes are.

    A class is what stands in the column label, a text, a whole number or a truth value. Classes are numbered in the
    order of the alphabet, or of the numbers, if all are numbers.
    """

    def __init__(self, data: GlueDataConfig) -> None:
        self.regression = data.regression
        self.texts: tuple[str, ...] = ()
        self.classes: tuple[str, ...] = ()
        self._mapped = set(data.column_of.values()) - set(data.column_of)
        self._named: set[str] = set()
        self._is_closed = False

    def __call__(self, row: object, origin: str) -> LabelledText:
        """Check one row.

        Raises:
            UserError: a text or the label is missing or of another kind, or the class is none of the training rows'.
        """
        row = object_row(row, origin, ("text", "label"))
        if not self.texts:
            self.texts = self._texts_of(row, origin)
        texts = tuple(text_field(row, name, origin, can_map=True) for name in self.texts)
        if self.regression:
            return LabelledText(texts, self._number(row, origin))
        name = self._class(row, origin)
        if self._is_closed and name not in self.classes:
            known = ", ".join(shown(known)[1:-1] for known in self.classes[:8])
            raise UserError(
                f"{origin}: field label is {shown(name)}, which no training row has; legal: {known}; {REMEDY}"
            )
        self._named.add(name)
        return LabelledText(texts, math.nan, name, origin)

    def close(self) -> int:
        """The training rows are read: their classes are all that there are. Returns how many; regression: 1.

        Raises:
            UserError: all have the same class, or classes are numbers with fractions.
        """
        if self.regression:
            return 1
        self._is_closed = True
        self.classes = tuple(sorted(self._named))
        if all(_WHOLE.fullmatch(name) or _FRACTION.fullmatch(name) for name in self.classes):
            if fractions := [name for name in self.classes if not _WHOLE.fullmatch(name)]:
                raise UserError(
                    f"data: labels of the training rows are numbers with fractions ({', '.join(fractions[:3])}): "
                    "--regression predicts such numbers; for a class of such a name give it a word"
                )
        if all(_WHOLE.fullmatch(name) for name in self.classes):
            self.classes = tuple(sorted(self.classes, key=int))  # 1 and 01 are two classes, in one order everywhere
        if len(self.classes) < 2:
            raise UserError(
                f"data: all training rows have the label {shown(self.classes[0])}; legal: two classes or more; give "
                "rows of others, or --regression if labels are numbers to be predicted"
            )
        return len(self.classes)

    def say_scale(self, rows: Sequence[LabelledText]) -> None:
        """Warn where the numbers to be predicted are far from those that a new head can reach."""
        if not self.regression or len(rows) < 2:
            return
        labels = [row.label for row in rows]
        mean, deviation = statistics.fmean(labels), statistics.stdev(labels)
        if max(abs(mean), deviation) > _FAR:
            logger.warning(
                "labels of the training rows are %.4g on average, with a standard deviation of %.4g: a new head begins "
                "near 0 and each step moves it by about the learning rate, so it may never get there: train on "
                "(label - %.4g) / %.4g, and scale predictions back",
                mean, deviation, mean, deviation or 1,
            )  # fmt: skip

    def numbered(self, rows: Sequence[LabelledText]) -> list[LabelledText]:
        """The rows with the numbers of their classes."""
        if self.regression:
            return list(rows)
        number = {name: float(index) for index, name in enumerate(self.classes)}
        return [replace(row, label=number[row.name]) for row in rows]

    @property
    def metrics(self) -> tuple[str, ...]:
        """What the task is scored by; see ``metrics.py``."""
        if self.regression:
            return ("pearson", "spearman", "rmse")
        return ("accuracy", "f1" if len(self.classes) == 2 else "macro_f1", "matthews")

    def _texts_of(self, row: Mapping[str, Any], origin: str) -> tuple[str, ...]:
        """A column that is given to a field is that field, and makes no pair under its own name."""
        for names in TEXTS:
            if all(name in row and name not in self._mapped for name in names):
                return names
        raise UserError(
            f"{origin}: no column of texts is known: the row has {names_of(row)}; name yours with --columns "
            "text=COLUMN,label=COLUMN, and a second text with text2=COLUMN"
        )

    @staticmethod
    def _class(row: Mapping[str, Any], origin: str) -> str:
        value = row.get("label")
        if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
            return str(value) if isinstance(value, bool) else str(int(value))
        if isinstance(value, str) and value.strip():
            refuse_odd_text(value, "label", origin)
            whole = _WRITTEN_WHOLE.fullmatch(value.strip())
            return str(int(whole[1])) if whole else value.strip()
        hint = "; numbers with fractions are for --regression" if isinstance(value, float) else ""
        has = absence(row, "label", can_map=True)
        raise UserError(
            f"{origin}: field label is {shown(value)}{has}; legal: a text, a whole number or a truth value{hint}; "
            f"{REMEDY}"
        )

    @staticmethod
    def _number(row: Mapping[str, Any], origin: str) -> float:
        value = row.get("label")
        try:
            number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            has = absence(row, "label", can_map=True)
            raise UserError(f"{origin}: field label is {shown(value)}{has}; legal: a number; {REMEDY}")
        return number
