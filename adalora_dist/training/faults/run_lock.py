"""One run per output folder: the second is refused and told who the first is; the lock of a dead one is taken over."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from filelock import FileLock, Timeout

from adalora_dist.io.errors import UserError, printable
from adalora_dist.io.foreign_files import read_object
from adalora_dist.io.publish import refuse_link, write_whole
from adalora_dist.training.faults.verdict import Identity

STALE_SECONDS = 120.0
"""An owner on another machine that has not shown itself for so long is dead."""


class RunLock:
    """Held by the main process while its run lives.

    The operating system's lock on ``.lock`` decides wherever it reaches: it ends with its process, however that ends.
    Some network file systems keep it to one machine, so the owner also shows itself by the time stamp of
    ``.lock-owner``: see :meth:`touch`.

    Raises:
        UserError: the folder belongs to a living run, or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._owner_file = folder / ".lock-owner"
        self._touched = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            refuse_link(folder / ".lock")
            self._lock = FileLock(folder / ".lock", timeout=0, thread_local=False)  # any thread may end the run
            self._lock.acquire()
            me = Identity.of_this_process(0)
            if (owner := self._owner()) and owner["host"] != me.host and self._seconds_since_touch() < STALE_SECONDS:
                self._lock.release()
                raise Timeout(str(folder))
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            write_whole(self._owner_file, json.dumps({"host": me.host, "pid": me.pid, "since": since}))
        except Timeout:
            raise UserError(f"output_dir={folder} {self._refusal()}") from None
        except OSError as error:
            raise UserError(f"output_dir={folder} cannot be written ({error}): choose another folder") from error

    def touch(self) -> None:
        """Show that the owner lives; call it more often than every ``STALE_SECONDS``."""
        if time.monotonic() - self._touched > STALE_SECONDS / 10:
            self._touched = time.monotonic()
            try:
                os.utime(self._owner_file, follow_symlinks=False)
            except OSError:
                return  # a full or absent disk: the run itself will say so

    def release(self) -> None:
        """The folder is free again. Does nothing the second time."""
        if self._lock.is_locked:
            self._owner_file.unlink(missing_ok=True)
            self._lock.release()

    def _owner(self) -> dict[str, str] | None:
        try:
            content = read_object(self._owner_file)
            return {key: printable(content[key], 100) for key in ("host", "pid", "since")}
        except (UserError, LookupError):
            return None

    def _seconds_since_touch(self) -> float:
        return time.time() - self._owner_file.lstat().st_mtime

    def _refusal(self) -> str:
        owner = self._owner() or {"host": "?", "pid": "?", "since": "?"}
        return (
            f"is in use by the run of process {owner['pid']} on {owner['host']} since {owner['since']}: choose another "
            "--output-dir, or end that run"
        )
