"""Rows of tables of text, CSV and TSV: every cell is a text. Never imports torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TextIO

from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import MAX_BYTES, NotReadable

_MOST_CELLS = 1 << 22
"""Of a row; commas within cells count as well."""


class _Lines:
    """The lines of a table, as long as a row of them is no longer than one of any other file of rows."""

    def __init__(self, text: TextIO, delimiter: str) -> None:
        self._text, self._delimiter = text, delimiter
        self.begin_row()

    def begin_row(self) -> None:
        """What comes is counted from here."""
        self._num_characters = self._num_cells = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if not (line := self._text.readline(MAX_BYTES + 1)):
            raise StopIteration
        self._num_characters += len(line)
        self._num_cells += line.count(self._delimiter)
        if self._num_characters > MAX_BYTES or self._num_cells > _MOST_CELLS:
            raise NotReadable(f"a row has more than {MAX_BYTES:,} characters, or {_MOST_CELLS:,} cells")
        return line


def text_table_rows(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    """Rows of a table of text; row 1 is the first behind the header, however many lines a cell has."""
    # What is not UTF-8 becomes lone surrogates, so that it is one row's fault.
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        yield from _rows_of_text(path, text)


def _rows_of_text(path: Path, text: TextIO) -> Iterator[tuple[str, object]]:
    csv.field_size_limit(MAX_BYTES)  # Python's own limit of 128 KiB is less than a document
    delimiter = "\t" if ".tsv" in path.name else ","
    lines = _Lines(text, delimiter)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    number = 0
    while True:
        lines.begin_row()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{path} is not a valid table ({error} at line {reader.line_num}); write it again, with cells in "
                "double quotes and double quotes in them doubled"
            ) from error
        if cells is None:
            return
        if not cells:
            continue
        if not header:
            header = _checked_header(path, [name.strip() for name in cells], delimiter)
            continue
        number += 1
        origin = f"{path}:{number}"
        if len(cells) != len(header):
            yield origin, UserError(f"{origin}: the row has {len(cells)} cells, the header {len(header)}; correct it")
        elif not _is_unicode(cells):
            yield origin, UserError(f"{origin}: not UTF-8 text; save the table as UTF-8")
        else:
            yield origin, dict(zip(header, cells, strict=True))


def _checked_header(path: Path, header: list[str], delimiter: str) -> list[str]:
    if not _is_unicode(header):
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8")
    if repeated := [name for name in header if header.count(name) > 1]:
        raise UserError(f"{path}: two columns are called {repeated[0]!r}; rename one of them in the first line")
    others = [mark for mark in ";\t,|" if mark != delimiter and mark in header[0]]
    if len(header) == 1 and others:
        raise UserError(
            f"{path}: the header is one cell, {header[0][:80]!r}; separate cells by {delimiter!r} (not {others[0]!r})"
        )
    return header


def _is_unicode(cells: Sequence[str]) -> bool:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return False
    return True
