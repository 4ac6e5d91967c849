"""JSON and YAML that anybody may have written: read within limits, or refused in one line that names the file.

Runs, adapters and base models travel, so what lies in their folders is not what this project has put there. A parser
runs out of stack on deep nesting, a list answers to no key, and text that is no Unicode breaks the first print.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from adalora_dist.io.errors import UserError

MAX_BYTES = 1 << 26
"""Of a JSON file, or of one line of a file of records; the index of 90,000 tensors has a seventh of it."""
_MAX_YAML_BYTES = 1 << 20
_MAX_DEPTH = 32
"""Of objects and lists within each other. Whatever is read can be written again, which takes stack as well."""


class _NotReadable(ValueError):
    """The reason, in a few words."""


class _PlainLoader(yaml.SafeLoader):
    """Without aliases, by which a few lines stand for gigabytes. A run writes none."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise _NotReadable("it has aliases")
        return super().compose_node(parent, index)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, is no JSON object, or is larger or deeper than any that this project reads.
    """
    try:
        return _parse_object(_read(path, MAX_BYTES))
    except _NotReadable as reason:
        raise _refusal(path, reason) from None


def read_text(path: Path) -> str:
    """A file of words, such as a vocabulary.

    Raises:
        UserError: it cannot be read, is no text or empty, or is larger than any that this project reads.
    """
    try:
        content = _text(_read(path, MAX_BYTES))
        if not content:
            raise _NotReadable("it is empty")
    except _NotReadable as reason:
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
        with _opened(path) as file:
            while (line := _limited(file.readline(MAX_BYTES + 1), MAX_BYTES)).endswith(b"\n"):
                records.append(_parse_object(line))
    except _NotReadable as reason:
        raise _refusal(f"{path}:{len(records) + 1}", reason) from None
    return records


def read_sections(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a run's config.yaml, by name; what is no section is left out.

    Raises:
        UserError: it cannot be read, or is no mapping.
    """
    try:
        content = yaml.load(_text(_read(path, _MAX_YAML_BYTES)), _PlainLoader)
        _check(content)
    except _NotReadable as reason:
        raise _refusal(path, reason) from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise _refusal(path, "it is not YAML") from None
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, dict)}


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """The object in a piece of JSON that was found in ``where``.

    Raises:
        UserError: as :func:`read_object`.
    """
    try:
        return _parse_object(text)
    except _NotReadable as reason:
        raise _refusal(where, reason) from None


def _refusal(where: Path | str, reason: object) -> UserError:
    return UserError(f"{where} cannot be read ({reason}): bring it back from a copy, or do without it")


def _read(path: Path, max_bytes: int) -> bytes:
    with _opened(path) as file:
        return _limited(file.read(max_bytes + 1), max_bytes)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if path.exists() and not path.is_file():
        raise _NotReadable("it is no plain file")  # opening a pipe would wait for ever
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise _NotReadable(error.strerror) from None


def _limited(content: bytes, max_bytes: int) -> bytes:
    if len(content) > max_bytes:
        raise _NotReadable(f"it has more than {max_bytes:,} bytes")
    return content


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise _NotReadable("it is not UTF-8 text") from None


def _parse_object(content: bytes) -> dict[str, Any]:
    text = _text(content)
    try:
        parsed: dict[str, Any] = json.loads(text)
    except RecursionError:
        raise _NotReadable(f"it is nested deeper than {_MAX_DEPTH}") from None
    except ValueError:
        raise _NotReadable("it is not JSON") from None
    _check(parsed)
    return parsed


def _check(parsed: Any) -> None:
    if not isinstance(parsed, dict):
        raise _NotReadable(f"it holds a {type(parsed).__name__}, not an object")
    level: list[Any] = [parsed]
    for _ in range(_MAX_DEPTH):
        inner = [child for node in level for child in (chain(*node.items()) if isinstance(node, dict) else node)]
        try:
            "".join(child for child in inner if isinstance(child, str)).encode()
        except UnicodeEncodeError:  # an escape that stands for half a character
            raise _NotReadable("it is not Unicode text") from None
        level = [child for child in inner if isinstance(child, dict | list)]
        if not level:
            return
    raise _NotReadable(f"it is nested deeper than {_MAX_DEPTH}")
