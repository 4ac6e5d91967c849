"""Text, one document after the other, from wherever ``--data`` says. Nothing is held but the present row."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.pretrain.config import C4, PretrainDataConfig
from adalora_dist.tasks.pretrain.demo import demo_stories
from adalora_dist.tasks.rows.bad_rows import BadRows, Rows
from adalora_dist.tasks.rows.fields import object_row, text_field
from adalora_dist.tasks.rows.files import READ as ROWS
from adalora_dist.tasks.rows.files import LocalSplit, data_files
from adalora_dist.tasks.rows.read import decompressed, file_rows, readable, refuse_zeros

PLAIN = (".txt", ".txt.gz", ".txt.zst")
READ = (*ROWS, *PLAIN)
_MAX_DOCUMENT_BYTES = 1 << 16
"""Of plain text without an empty line; what is longer goes on as another document."""


class Source(Protocol):
    """Rows with a text, that can be read again and again."""

    def rows(self) -> Rows: ...

    def identity(self) -> Iterator[bytes]:
        """What the rows depend on."""
        ...


@dataclass(frozen=True)
class Files:
    """Files of rows or of plain text."""

    split: LocalSplit
    column: str

    def rows(self) -> Rows:
        for path in self.split.files:
            yield from _plain_rows(path, self.column) if path.name.endswith(PLAIN) else file_rows(path)

    def identity(self) -> Iterator[bytes]:
        yield from self.split.identity()


class Stories:
    """The built-in text."""

    def rows(self) -> Rows:
        for number, story in enumerate(demo_stories(), start=1):
            yield f"built-in:{number}", {"text": story}

    def identity(self) -> Iterator[bytes]:
        yield from (story.encode() for story in demo_stories())


@dataclass(frozen=True)
class Streamed:
    """One split of allenai/c4, en, read over the network without being kept."""

    split: str

    def rows(self) -> Rows:
        import datasets

        try:
            stream = datasets.load_dataset("allenai/c4", "en", split=self.split, streaming=True)
            for number, row in enumerate(stream, start=1):
                yield f"allenai/c4/en/{self.split}:{number}", row
        except Exception as error:  # whatever HTTP client or parser failed, the user can do the same about it
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"data=c4: cannot read allenai/c4 ({reason}); check the network and HF_HUB_OFFLINE, or give files of "
                "text: --data FILE_OR_FOLDER"
            ) from error

    def identity(self) -> Iterator[bytes]:
        yield f"allenai/c4 en {self.split}".encode()


def sources_of(data: PretrainDataConfig) -> tuple[Source, Source | None]:
    """What is trained on, and what is set apart for validation; None: a share of the first.

    Raises:
        UserError: a path that is not there, or holds no files of text.
    """
    if not data.source:
        return Stories(), None
    if C4 in data.source:
        return Streamed("train"), Streamed("validation")
    files = tuple(path for word in data.source for path in _files(word, "data"))
    held_out = Files(LocalSplit("validation", _files(data.eval_split, "eval_split")), data.column)
    return Files(LocalSplit("train", files), data.column), held_out if data.eval_split else None


def documents(source: Source, column: str, bad: BadRows) -> Iterator[str]:
    """The texts.

    Raises:
        UserError: a row has none, and the policy of ``bad`` is error.
    """
    return bad.usable(source.rows(), lambda row, origin: text_field(object_row(row, origin, [column]), column, origin))


def _files(word: str, setting: str) -> tuple[Path, ...]:
    path = Path(word)
    if not word:
        return ()
    if path.is_dir():
        if found := data_files(path, READ):
            return tuple(found)
        raise UserError(f"{setting}={word}: no file there ends in {', '.join(READ)}; put the text there in such files")
    if not path.is_file():
        raise UserError(f"{setting}={word}: no such file or folder; give files or folders of text, or c4")
    if not path.name.endswith(READ):
        raise UserError(f"{setting}={word}: its name must end in one of {', '.join(READ)}; rename it as what it is")
    return (path,)


def _plain_rows(path: Path, column: str) -> Rows:
    """Blocks of lines up to an empty one. One that is not UTF-8 is yielded as the error that says so."""
    refuse_zeros(path)
    with readable(path), decompressed(path) as lines:
        block, first, number = bytearray(), 1, 1
        for piece in iter(lambda: lines.readline(_MAX_DOCUMENT_BYTES), b""):
            if number == 1 and not block:
                piece = piece.removeprefix(codecs.BOM_UTF8)
            first = first if block else number
            number += piece.endswith(b"\n")
            if piece.strip():
                block += piece
            if block and (not piece.strip() or len(block) >= _MAX_DOCUMENT_BYTES):
                whole = _whole_characters(block)
                yield _document(path, first, block[:whole], column)
                block = block[whole:]
        if block:
            yield _document(path, first, block, column)


def _whole_characters(block: bytearray) -> int:
    """Bytes of it without a character at its end that goes on behind it."""
    try:
        return codecs.utf_8_decode(block, "strict", False)[1]
    except UnicodeDecodeError:
        return len(block)


def _document(path: Path, line: int, block: bytearray, column: str) -> tuple[str, object]:
    origin = f"{path}:{line}"
    try:
        return origin, {column: block.decode().strip()}
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start} from there"
        return origin, UserError(f"{origin}: not UTF-8 text ({reason}); save it as UTF-8")
