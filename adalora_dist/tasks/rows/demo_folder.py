"""Built-in data as files in the user's cache, so that they are read like anybody's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adalora_dist.io.cache import cache_folder
from adalora_dist.io.digest import digest_of
from adalora_dist.io.errors import UserError
from adalora_dist.io.publish import scratch_folder


def write_rows(folder: Path, files: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write .jsonl files (relative path -> rows)."""
    for path, rows in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def demo_folder(name: str, files: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """A folder in the cache with these .jsonl files (relative path -> rows), written the first time.

    Its name holds a digest of the rows, so another version of them never meets old files. It is published by rename:
    several processes may call this at once.

    Raises:
        UserError: the cache cannot be written.
    """
    digest = digest_of([json.dumps(files).encode()])[:8]
    cache = cache_folder()
    folder = cache / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with scratch_folder(cache) as scratch:
            built = scratch / "data"
            write_rows(built, files)
            try:
                built.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster, with the same rows
                    raise
    except OSError as error:
        raise UserError(
            f"cannot write the built-in data to {cache}: {error.strerror or error}; set ADALORA_DIST_CACHE to a "
            "writable folder, or use your own data: --data FOLDER"
        ) from error
    return folder
