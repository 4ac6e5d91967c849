"""Files that anybody may have written: read within limits, or refused in one line that names the file.

Runs, adapters and base models travel, so what lies in their folders is not what this project has put there. A pipe in
place of a file is waited for for ever, a device or a file of holes fills the memory, a parser runs out of stack on deep
nesting, a list answers to no key, and text that is no Unicode breaks the first print.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import yaml

from adalora_dist.io.errors import UserError

MAX_BYTES = 1 << 26
"""Of a JSON file, or of one line of a file of records; the index of 90,000 tensors has a seventh of it."""
MAX_RECORDS_BYTES = 1 << 30
"""Of a file of records: what is read of it is held in memory."""
_MAX_YAML_BYTES = 1 << 20
_MAX_YAML_SIGNS = 1 << 14
"""Commas, colons, brackets, dashes and lines: a run's file has some hundred, and a parser in Python is slow."""
_MAX_INTEGER_BITS = 1 << 10
_MAX_VALUES = 5 << 19
"""Of a JSON file or a row of data: a few bytes of text are a hundred in memory. Large tokenizers have 2 million."""
_MAX_DEPTH = 32
"""Of objects and lists within each other. Whatever is read can be written again, which takes stack as well."""


class NotReadable(ValueError):
    """The reason, in a few words."""


class ForeignLoader(yaml.SafeLoader):
    """SafeLoader whose refusals are all its own: what it makes of a value that a tag says to be an integer, a time or a
    set, and that is none, is any error that there is; and an integer may have more digits than Python prints."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            made = super().construct_object(node, deep)
        except (LookupError, AttributeError, TypeError, ArithmeticError, ValueError) as error:
            if isinstance(error, NotReadable):
                raise
            self._refuse(node, " ".join(str(error).split()) if isinstance(error, ValueError) else "")
        if isinstance(made, int) and made.bit_length() > _MAX_INTEGER_BITS:
            self._refuse(node, "it has too many digits")
        return made

    def _refuse(self, node: yaml.Node, reason: str) -> NoReturn:
        kind = node.tag.rpartition(":")[2]
        why = f": {reason:.100}" if reason else ""
        raise yaml.MarkedYAMLError(problem=f"a value is no {kind}{why}", problem_mark=node.start_mark)


class _PlainLoader(ForeignLoader):
    """Without aliases, by which a few lines stand for gigabytes. A run writes none."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise NotReadable("it has aliases")
        return super().compose_node(parent, index)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, is no JSON object, or is larger or deeper than any that this project reads.
    """
    try:
        return _parse_object(read_plain(path))
    except NotReadable as reason:
        raise _refusal(path, reason) from None


def read_text(path: Path) -> str:
    """A file of words, such as a vocabulary.

    Raises:
        UserError: it cannot be read, is no text or empty, or is larger than any that this project reads.
    """
    try:
        content = _text(read_plain(path))
        if not content:
            raise NotReadable("it is empty")
    except NotReadable as reason:
        raise _refusal(path, reason) from None
    return content


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects in a file with one on each line; none without the file. A last line without its end does not count.

    Raises:
        UserError: a line is no object; as :func:`read_object`.
    """
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    try:
        with opened(path, MAX_RECORDS_BYTES) as file:
            while (line := _limited(file.readline(MAX_BYTES + 1), MAX_BYTES)).endswith(b"\n"):
                records.append(_parse_object(line))
    except NotReadable as reason:
        raise _refusal(f"{path}:{len(records) + 1}", reason) from None
    return records


def read_sections(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a run's config.yaml, by name; what is no section is left out.

    Raises:
        UserError: it cannot be read, or is no mapping.
    """
    try:
        content = yaml.load(text_of_yaml(path), _PlainLoader)
        _check(content)
    except NotReadable as reason:
        raise _refusal(path, reason) from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise _refusal(path, "it is not YAML") from None
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, dict)}


def text_of_yaml(path: Path) -> str:
    """A YAML file that is not too large to be parsed.

    Raises:
        NotReadable: it is, or it cannot be read.
    """
    text = _text(read_plain(path, _MAX_YAML_BYTES))
    if sum(text.count(sign) for sign in ",:[{-?\n") > _MAX_YAML_SIGNS:
        raise NotReadable("it has more entries than any configuration")
    return text


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """The object in a piece of JSON that was found in ``where``.

    Raises:
        UserError: as :func:`read_object`.
    """
    try:
        return _parse_object(text)
    except NotReadable as reason:
        raise _refusal(where, reason) from None


def _refusal(where: Path | str, reason: object) -> UserError:
    return UserError(f"{where} cannot be read ({reason}): bring it back from a copy, or do without it")


def check_plain(path: Path, max_bytes: int | None = None) -> None:
    """Raise a ``UserError`` unless a library that is given this path will find a plain file, of that size at most."""
    try:
        with opened(path, max_bytes):
            pass
    except NotReadable as reason:
        raise _refusal(path, reason) from None


def check_tensors(path: Path, remedy: str = "bring it back from a copy") -> None:
    """Raise unless a safetensors file is as long as its header says, which is before a library maps it into memory.

    Raises:
        UserError: it is no plain file, or not whole.
    """
    try:
        with opened(path) as file:
            num_bytes, size_bytes = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
            if not 2 <= num_bytes <= min(MAX_BYTES, size_bytes):
                raise NotReadable("it has no header")
            header = _parse_object(file.read(num_bytes))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            ends = [entry["data_offsets"][1] for entry in tensors]
            if 8 + num_bytes + max(ends, default=0) != size_bytes:
                raise NotReadable("it is longer or shorter than its header says")
    except (NotReadable, LookupError, TypeError) as error:
        reason = error if isinstance(error, NotReadable) else "its header is none"
        raise UserError(f"{path} is not a whole safetensors file ({reason}): {remedy}") from None


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a plain file.

    Raises:
        UserError: it cannot be read, or is larger.
    """
    try:
        return read_plain(path, max_bytes)
    except NotReadable as reason:
        raise _refusal(path, reason) from None


def read_plain(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """As :func:`read_bytes`, for callers who say themselves what is to be done.

    Raises:
        NotReadable: it cannot be read, or is larger.
    """
    with opened(path, max_bytes) as file:
        return _limited(file.read(max_bytes + 1), max_bytes)


@contextlib.contextmanager
def opened(path: Path, max_bytes: int | None = None) -> Iterator[BufferedReader]:
    """A plain file, or a link to one. Neither looking at it nor opening it waits for anybody.

    Raises:
        NotReadable: it is something else, is larger, or an operation in the block fails.
    """
    try:
        _refuse_odd(os.stat(path), max_bytes)
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
            _refuse_odd(os.fstat(file.fileno()), max_bytes)  # another may stand there by now
            yield file
    except OSError as error:
        raise NotReadable(error.strerror or str(error)) from None
    except NotReadable:
        raise
    except ValueError as error:
        if "null" not in str(error):  # a name with a zero in it
            raise
        raise NotReadable("its name is none") from None


def _refuse_odd(about: os.stat_result, max_bytes: int | None) -> None:
    if not stat.S_ISREG(about.st_mode):
        is_folder = stat.S_ISDIR(about.st_mode)
        raise NotReadable("Is a directory, no plain file" if is_folder else "it is no plain file")
    if max_bytes is not None and about.st_size > max_bytes:
        raise NotReadable(f"it has more than {max_bytes:,} bytes")


def _limited(content: bytes, max_bytes: int) -> bytes:
    if len(content) > max_bytes:
        raise NotReadable(f"it has more than {max_bytes:,} bytes")
    return content


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise NotReadable("it is not UTF-8 text") from None


def _parse_object(content: bytes) -> dict[str, Any]:
    text = _text(content)
    try:
        parsed: dict[str, Any] = loads(text)
    except NotReadable:
        raise
    except RecursionError:
        raise NotReadable(f"it is nested deeper than {_MAX_DEPTH}") from None
    except ValueError:
        raise NotReadable("it is not JSON") from None
    _check(parsed)
    return parsed


def loads(text: str) -> Any:
    """Any JSON, if it does not fill the memory.

    Raises:
        NotReadable: it does.
        ValueError: it is none, or has a number with thousands of digits.
        RecursionError: it is nested too deeply for a parser.
    """
    if len(text) > _MAX_VALUES and sum(text.count(sign) for sign in ",[{") > _MAX_VALUES:
        raise NotReadable(f"it has more than {_MAX_VALUES:,} values")
    return json.loads(text)


def _check(parsed: Any) -> None:
    if not isinstance(parsed, dict):
        raise NotReadable(f"it holds a {type(parsed).__name__}, not an object")
    level: list[Any] = [parsed]
    for _ in range(_MAX_DEPTH):
        deeper = []
        for node in level:
            for child in chain.from_iterable(node.items()) if isinstance(node, dict) else node:
                if isinstance(child, str):
                    _refuse_half_characters(child)
                elif isinstance(child, dict | list):
                    deeper.append(child)
        level = deeper
        if not level:
            return
    raise NotReadable(f"it is nested deeper than {_MAX_DEPTH}")


def _refuse_half_characters(text: str) -> None:
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:  # an escape that stands for half a character
        raise NotReadable("it is not Unicode text") from None
