"""Files that a command knows as its own by a mark near their beginning: it replaces those, and nobody else's."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import NotReadable, opened

_WITHIN_BYTES = 4096


def is_marked(path: Path, mark: bytes, within_bytes: int = _WITHIN_BYTES) -> bool:
    """Whether it is a plain file, or a link to one, that has ``mark`` in its first bytes."""
    try:
        with opened(path) as file:
            return mark in file.read(within_bytes)
    except NotReadable:
        return False


def refuse_others(path: Path, mark: bytes, remedy: str) -> None:
    """Raise if what has the name of a file that is to be written is somebody's: a file without the mark, a pipe.

    A link is replaced, and so is one of several names of a file: what they lead to stays where it is. So is a file with
    nothing in it. To folders an operating system says no by itself.

    Raises:
        UserError: it is somebody's.
    """
    if not os.path.lexists(path):
        return
    about = path.lstat()
    is_plain = stat.S_ISREG(about.st_mode)
    may_go = stat.S_ISLNK(about.st_mode) or (is_plain and (about.st_nlink > 1 or not about.st_size))
    if not may_go and not stat.S_ISDIR(about.st_mode) and not is_marked(path, mark):
        raise UserError(f"{path} is there and is not of adalora-dist: {remedy}")
