"""One run per output folder: the second is refused and told who the first is; the lock of a dead one is taken over.

Two things say that a run lives. The operating system's lock on ``.lock`` ends with its process, however that ends, and
decides wherever it reaches; some network file systems keep it to one machine, others have none. So the owner also
writes ``.lock-owner`` and touches it every few seconds. Whoever finds such a file of another machine watches it: one
that changes has a living owner. No clock is read, so it does not matter whether those of the two machines agree.

The file is made where there is none, which one of many can do. To replace that of a dead owner takes a claim, a file
that is made in the same way and named after what is to be replaced, so of many that see it dead one replaces it. A
claim stands for a moment; one that stands still while it is watched has a dead holder, and is removed as an owner's
file is replaced: with a claim on it. Who was taken for dead and comes back, a machine that had slept, finds another's
file and ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from adalora_dist.io.errors import UserError, printable
from adalora_dist.io.foreign_files import NotReadable, read_object, read_plain
from adalora_dist.io.publish import refuse_link, write_whole
from adalora_dist.training.faults.verdict import Identity

STALE_SECONDS = 60.0
"""Whose file has not changed while it was watched for so long, an owner's on another machine or a claim, is dead."""
_TOUCH_SECONDS = STALE_SECONDS / 12
_LOOK_SECONDS = 0.25
_EMPTY_SECONDS = 1.0
"""How long a file may be empty that somebody has just made, and is about to write."""


_CLAIM = re.compile(r"\.lock-owner(\.[0-9a-f]{16})+")


class _Found(NamedTuple):
    """What stands under the owner's name."""

    mark: str
    """Of this file and no other, whatever is written under the name later."""
    changed: int
    owner: dict[str, str] | None
    """Host, process and since when; None: it is no owner's file."""


class RunLock:
    """Held by the main process while its run lives.

    Raises:
        UserError: the folder belongs to a living run, or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._owner_file = folder, folder / ".lock-owner"
        self._token, self._touched = secrets.token_hex(8), time.monotonic()
        self._descriptor: int | None = None
        self._lock_works = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            refuse_link(folder / ".lock")
            self._take()
        except OSError as error:
            self._unlock()
            raise UserError(f"output_dir={folder} cannot be written ({error}): choose another folder") from error
        except BaseException:
            self._unlock()
            raise

    def touch(self) -> bool:
        """Show that the owner lives; call it more often than every few seconds. False: another run has the folder."""
        if time.monotonic() - self._touched > _TOUCH_SECONDS and self._descriptor is not None:
            self._touched = time.monotonic()
            if (owner := _owner(self._owner_file)) is not None and owner["token"] != self._token:
                return False
            with contextlib.suppress(OSError):  # a full or absent disk: the run itself will say so
                os.utime(self._owner_file, follow_symlinks=False)
        return True

    def release(self) -> None:
        """The folder is free again. Does nothing the second time."""
        if self._descriptor is not None:
            if self._is_mine(self._owner_file):
                self._owner_file.unlink(missing_ok=True)
            self._unlock()

    # ------------------------------------------------------------------------------------------------------ to get it

    def _take(self) -> None:
        self._lock_works = self._lock()
        me = Identity.of_this_process(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        record = json.dumps({"host": me.host, "pid": me.pid, "since": since, "token": self._token})
        found = _find(self._owner_file)
        if found is not None and (owner := found.owner) is not None and not self._is_dead(found):
            self._tell(f"to see whether the run of process {owner['pid']} on {owner['host']} still lives")
            found = self._watch(self._owner_file, found)
        if found is None:
            if not _made(self._owner_file, record):
                raise self._refusal()
        else:
            with self._claimed(self._owner_file, found, record):
                write_whole(self._owner_file, record)
        if not self._is_mine(self._owner_file):
            raise self._refusal()
        self._remove_old_claims()

    @contextlib.contextmanager
    def _claimed(self, path: Path, dead: _Found, record: str) -> Iterator[None]:
        """While only this process may replace or remove ``path``, whose owner is dead.

        Raises:
            UserError: somebody else has been faster, or is about to.
        """
        claim = path.with_name(f"{path.name}.{dead.mark}")
        while not _made(claim, record):
            standing = _find(claim)
            if standing is not None and not self._is_dead(standing):
                self._tell("for another run that is taking it over")
                standing = self._watch(claim, standing)
            if standing is None:  # given back, by one that has what it wanted
                raise self._refusal()
            with self._claimed(claim, standing, record):
                claim.unlink(missing_ok=True)
        try:
            now = _find(path)
            if now is None or now.mark != dead.mark or not self._is_mine(claim):
                raise self._refusal()
            yield
        finally:
            if self._is_mine(claim):
                claim.unlink(missing_ok=True)

    def _is_dead(self, found: _Found) -> bool:
        """Whether it is of this machine, where the lock that this process has would be its own if it lived."""
        return self._lock_works and found.owner is not None and found.owner["host"] == socket.gethostname()

    def _watch(self, path: Path, found: _Found) -> _Found | None:
        """What is there when it has stood still; None when it is gone.

        Raises:
            UserError: it has changed.
        """
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
            now = _find(path)
            if now is None:
                return None
            if (now.mark, now.changed) != (found.mark, found.changed):
                raise self._refusal()
        return found

    def _tell(self, what: str) -> None:
        text = f"output_dir={self._folder}: waiting up to {STALE_SECONDS:.0f} s {what}"
        print(text, file=sys.stderr, flush=True)

    def _remove_old_claims(self) -> None:
        """Those on files that are gone: their holders died when they had replaced them."""
        found = _find(self._owner_file)
        current = "" if found is None else f"{self._owner_file.name}.{found.mark}"
        for path in self._folder.glob(f"{self._owner_file.name}.*"):
            if _CLAIM.fullmatch(path.name) and not path.name.startswith(current):
                path.unlink(missing_ok=True)

    def _is_mine(self, path: Path) -> bool:
        return (owner := _owner(path)) is not None and owner["token"] == self._token

    def _refusal(self) -> UserError:
        owner = _owner(self._owner_file) or {"host": "?", "pid": "?", "since": "?"}
        return UserError(
            f"output_dir={self._folder} is in use by the run of process {owner['pid']} on {owner['host']} since "
            f"{owner['since']}: choose another --output-dir, or end that run"
        )

    # --------------------------------------------------------------------------------------- the operating system's

    def _lock(self) -> bool:
        """Take it; False: there are none here."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._descriptor = os.open(self._folder / ".lock", flags, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal() from None
        except OSError:
            return False
        return True

    def _unlock(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _find(path: Path) -> _Found | None:
    """None: nothing is there. What cannot be read, or is no owner's, may be replaced."""
    deadline = time.monotonic() + _EMPTY_SECONDS
    while True:
        try:  # opened first, after which network file systems tell the truth about it
            content = read_plain(path)
        except NotReadable:
            content = None
        try:
            about = path.lstat()
        except OSError:
            return None
        if content != b"" or time.monotonic() > deadline:
            break
        time.sleep(_LOOK_SECONDS / 10)
    digest = hashlib.sha256(f"{about.st_ino} ".encode() + (content or b"")).hexdigest()[:16]
    return _Found(digest, about.st_mtime_ns, _owner(path))


def _owner(path: Path) -> dict[str, str] | None:
    try:
        content: dict[str, Any] = read_object(path)
        return {key: printable(content[key], 100) for key in ("host", "pid", "since")} | {
            "token": printable(content.get("token"), 100)
        }
    except (UserError, LookupError):
        return None


def _made(path: Path, content: str) -> bool:
    """Make a file with that content; False: there is one of the name. Of many that try one does, on network file
    systems, too."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(content)
    return True
