"""A YAML file of nested sections, with the line of every setting, so that a mistake can be pointed at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import ForeignLoader, NotReadable, text_of_yaml

_MAX_NODES = 1 << 14


class _Loader(ForeignLoader):
    """That refuses a repeated key, of which YAML libraries silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue  # SafeLoader itself refuses what is not hashable, and what is no mapping
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is set twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> tuple[dict[Any, Any], dict[tuple[Any, ...], int]]:
    """The file's mapping, and the line (from 1) of each ``(section,)``, ``(section, key)`` and what lies deeper.

    Raises:
        UserError: a file that cannot be read, is not YAML or not a mapping, or repeats a key.
    """
    try:
        text = text_of_yaml(path)
    except NotReadable as error:
        raise UserError(f"--config {path}: cannot be read ({error}): give the path of a YAML file") from None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        _refuse_expansion(root)
        content: Any = loader.construct_document(root) if isinstance(root, yaml.MappingNode) else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML ({error.problem}): correct that line") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the last two: of a number, a date, deep nesting
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UserError(f"--config {path}: not valid YAML ({reason:.200}): correct the file") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config {path}: must be a mapping of sections, such as 'adapter: {{target_rank: 8}}'")
    return content, _lines(root, loader)


def _refuse_expansion(root: yaml.Node | None) -> None:
    """Raise a ``ValueError`` where aliases make much of little: some lines of them stand for gigabytes, or for ever."""
    sizes: dict[int, int] = {}
    above: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in above:
            raise ValueError("an alias of what it is in")
        if id(node) not in sizes:
            above.add(id(node))
            parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
            is_leaf = isinstance(node, yaml.ScalarNode)
            sizes[id(node)] = 1 + (0 if is_leaf else sum(size(part) for part in parts))
            above.discard(id(node))
        return sizes[id(node)]

    if root is not None and size(root) > _MAX_NODES:
        raise ValueError(f"aliases that stand for more than {_MAX_NODES:,} values")


def _lines(node: yaml.MappingNode, loader: _Loader, above: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], int]:
    lines: dict[tuple[Any, ...], int] = {}
    for key, body in node.value:
        path = (*above, loader.construct_object(key))
        lines[path] = key.start_mark.line + 1
        if isinstance(body, yaml.MappingNode):
            lines |= _lines(body, loader, path)
    return lines
