"""A folder of the user's cache that is built the first time it is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from adalora_dist.io.cache import cache_folder
from adalora_dist.io.errors import UserError
from adalora_dist.io.publish import scratch_folder

ANOTHER_MODEL = "or use another model: --model HUB_ID_OR_FOLDER"


def built_once(
    name: str,
    build: Callable[[Path, Path], None],
    what: str,
    is_complete: Callable[[Path], bool] = Path.is_dir,
    needed_bytes: int = 0,
) -> Path:
    """The folder ``name`` of the cache; ``build(folder, scratch)`` makes it, published by rename.

    Any number of processes may call this at once: one builds under a file lock, the others wait and find the result.
    Whatever fails leaves nothing half-made behind; what a process leaves that is killed, the next to build anything
    removes.

    Args:
        build: gets the folder to write, which does not exist, and an empty one for whatever else it needs.
        what: is built, for errors.
        is_complete: a folder that is not is built anew.
        needed_bytes: of disk while it is built.

    Raises:
        UserError: the cache cannot be written, or has not enough room.
    """
    cache = cache_folder()
    folder = cache / name
    if is_complete(folder):
        return folder
    from filelock import FileLock  # comes with huggingface_hub

    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock"):
            if is_complete(folder):
                return folder
            free_bytes = shutil.disk_usage(cache).free
            if free_bytes < needed_bytes:
                raise UserError(
                    f"{cache} has {free_bytes / 1e9:.1f} GB free, the {what} needs {needed_bytes / 1e9:.1f} GB: set "
                    f"ADALORA_DIST_CACHE to a folder on a larger disk, {ANOTHER_MODEL}"
                )
            with scratch_folder(cache) as scratch:
                built = scratch / "built"
                (scratch / "scratch").mkdir()
                build(built, scratch / "scratch")
                if folder.exists():  # incomplete, or we would not be here
                    shutil.rmtree(folder)
                built.rename(folder)
    except OSError as error:
        raise UserError(
            f"cannot build the {what} in {cache}: {error.strerror or error}; set ADALORA_DIST_CACHE to a writable "
            f"folder, {ANOTHER_MODEL}"
        ) from error
    return folder
