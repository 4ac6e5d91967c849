"""A YAML file of nested sections, with the line of every setting, so that a mistake can be pointed at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from adalora_dist.io.errors import UserError


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated key, of which YAML libraries silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # SafeLoader itself refuses what is not hashable
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
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"--config {path}: cannot be read ({reason}): give the path of a YAML file") from None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
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


def _lines(node: yaml.MappingNode, loader: _Loader, above: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], int]:
    lines: dict[tuple[Any, ...], int] = {}
    for key, body in node.value:
        path = (*above, loader.construct_object(key))
        lines[path] = key.start_mark.line + 1
        if isinstance(body, yaml.MappingNode):
            lines |= _lines(body, loader, path)
    return lines
