"""``adalora-dist ls`` and ``adalora-dist cp``: what is shipped beside the code, shown and copied."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

from adalora_dist.io.errors import UserError
from adalora_dist.io.publish import NO_ROOM, new_file, write_whole
from adalora_dist.io.shipped import KINDS, ROOT, any_shipped, files_of
from adalora_dist.training.recipe_file import schema_text

MAX_CHARACTERS = 118
_NAMES_SCHEMA = r"# yaml-language-server: \$schema=(?P<schema>(?P<recipe>\w+)\.schema\.json)\n"
"""The first line of an experiment: where editors find what may stand in it."""


def listing() -> str:
    """All shipped files by kind: name, and the first sentence that the file says of itself."""
    parts = []
    for kind, (title, _) in KINDS.items():
        files = files_of(kind)
        named = kind in ("recipe", "config", "engine")
        names = [path.stem if named else path.relative_to(ROOT).as_posix() for path in files]
        width = max(map(len, names), default=0)
        lines = [f"  {name:{width}}  {about(path)}".rstrip() for name, path in zip(names, files, strict=True)]
        parts.append("\n".join([title, *(line if len(line) <= MAX_CHARACTERS else _cut(line) for line in lines)]))
    last = f"All are in {ROOT}; adalora-dist cp NAME FILE copies one, to be edited."
    return "\n\n".join([*parts, last])


def about(path: Path) -> str:
    """What a file says of itself in its first sentence; nothing where it cannot hold a comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix in (".yaml", ".sh", ""):
        comments = re.match(rf"(?:#!.*\n|{_NAMES_SCHEMA})?(?P<about>(?:#.*\n)*)", text)
        text = re.sub(r"^# ?", "", comments["about"] if comments else "", flags=re.MULTILINE)
    else:
        return ""
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    return re.split(r"(?<=[a-z\])])[.;:] ", paragraph, maxsplit=1)[0].rstrip(".:")


def copy(name: str, destination: Path | None) -> Path:
    """Copy a shipped file.

    Args:
        name: of the file, with or without suffix, or its path as in a clone.
        destination: a file that there is not yet, or a folder; default: the working folder.

    Returns:
        Where it is now.

    Raises:
        UserError: there is no such file, or the destination exists or cannot be written.
    """
    source = any_shipped(name, destination.suffix if destination is not None else "")
    target = Path(source.name) if destination is None else destination
    target = target / source.name if target.is_dir() else target
    try:
        with new_file(target, replaces=False) as file:
            file.write(source.read_bytes())
            if source.suffix == ".sh":
                os.fchmod(file.fileno(), os.fstat(file.fileno()).st_mode | 0o111 & ~0o022)
    except FileExistsError:
        raise UserError(f"{target} exists already: name another file, such as my_{target.name}") from None
    except OSError as error:
        raise _refusal(target, error, "in a folder that exists") from error
    return target


def write_schema(copied: Path) -> Path | None:
    """Write the JSON schema that the first line of a copied experiment names, beside it.

    Returns:
        Where it is; None where the file names none, or it is there already.

    Raises:
        UserError: it cannot be written.
    """
    named = re.match(_NAMES_SCHEMA, copied.read_text(encoding="utf-8"))
    if named is None:
        return None
    path = copied.parent / named["schema"]
    if os.path.lexists(path):  # a look that saves the work; it is the writing that decides
        return None
    try:
        write_whole(path, schema_text(named["recipe"]) + "\n", replaces=False)
    except FileExistsError:
        return None
    except OSError as error:
        raise _refusal(path, error, "in a folder that can be written") from error
    return path


def _refusal(path: Path, error: OSError, where: str) -> UserError:
    where = "on another disk, or free some room" if error.errno in NO_ROOM else where
    return UserError(f"{path} cannot be written ({error.strerror}): name a file {where}")


def _cut(line: str) -> str:
    return line[: MAX_CHARACTERS - 4].rstrip() + " ..."
