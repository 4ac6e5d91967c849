"""Files and folders that come into being whole, in the folder where they were asked for and nowhere else.

A folder is built beside its place, in a scratch folder that belongs to one process, and renamed once; a file is written
beside its place and renamed over it. So a reader finds what was there before or all of the new, a link that somebody
left under the name is replaced and never followed, and two writers do not meet. A process that is killed leaves its
scratch folder, ``.NAME.HOST-PROCESS-NUMBER.partial``, which the next writer of NAME removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

import psutil
from safetensors import SafetensorError

from adalora_dist.io.errors import UserError

PARTIAL = ".partial"
"""The end of a scratch name: nothing that has it is complete."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What operating systems say of a disk that is full, of a quota, and of a limit on the size of files."""
_SHORT_CHARACTERS = 40
"""Of a name that go into a scratch name: file systems take 255 bytes."""
_ABANDONED_SECONDS = 3600.0
"""A scratch folder of another machine, whose processes cannot be seen, is left behind if nothing moves so long."""


# ------------------------------------------------------------------------------------------------------------- folders


@contextlib.contextmanager
def building(folder: Path, replaces: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """A scratch folder that becomes ``folder`` when the block ends, and is removed when it fails.

    Its files get the mode that the umask gives to new ones, and are on the disk before the folder has its name.

    Args:
        folder: must not exist; folders above it are made.
        replaces: whether a folder that has the name already is an earlier one of the same kind, and may go.

    Raises:
        UserError: there is something of that name, another process is writing it, or it cannot be written; on leaving
            the block also where something else took the name meanwhile. An OSError inside the block counts as the
            latter, in one line.
    """
    folder = folder.absolute()
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _refuse_taken(folder, replaces)
        scratch, lock = _claim(folder)
    try:
        with writing(folder):
            yield scratch
            _settle(scratch)
            _refuse_taken(folder, replaces)
            if replaces is not None:
                discard(folder)
            os.rename(scratch, folder)
            _sync(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def discard(folder: Path) -> None:
    """Remove a folder, if it is there, so that no reader finds a part of it under its name. A link goes by itself."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        aside = folder.with_name(_scratch_name(folder))
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def set_aside(folder: Path) -> Path:
    """Rename what has a name that is needed, and is somebody's, to the first free NAME.0.old; its new path."""
    count = 0
    while os.path.lexists(aside := folder.with_name(f"{folder.name}.{count}.old")):
        count += 1
    return folder.rename(aside)


def refuse_link(folder: Path) -> None:
    """Raise a ``UserError`` if a folder that is about to be written into is a link to some other place."""
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, and nothing is written through it: remove it, or give another folder")


def _refuse_taken(folder: Path, replaces: Callable[[Path], bool] | None) -> None:
    refuse_link(folder)
    if os.path.lexists(folder) and not (replaces is not None and folder.is_dir() and replaces(folder)):
        raise UserError(f"{folder} exists: give another folder, or remove it")


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """An empty folder in ``parent`` for something that is built there, removed at the end.

    Any number of processes may have one each. What those that were killed have left of theirs is removed first.

    Raises:
        OSError: it cannot be made.
    """
    name = parent / "building"
    with _alone_in(parent):
        _clear(name)
        scratch, lock = _new_scratch(name)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(lock)


def _claim(folder: Path) -> tuple[Path, int]:
    """The one scratch folder of ``folder``, as :func:`_new_scratch` gives it."""
    with _alone_in(folder.parent):
        if not _clear(folder):
            raise UserError(f"{folder} is being written by another process: wait for it, or give another folder")
        return _new_scratch(folder)


def _clear(folder: Path) -> bool:
    """Remove the scratch folders of processes that are gone; whether there were none of others."""
    pattern = re.compile(rf"\.{re.escape(folder.name[:_SHORT_CHARACTERS])}\.([\w-]+)-(\d+)-[0-9a-f]+\{PARTIAL}")
    is_alone = True
    for name in os.listdir(folder.parent):
        if match := pattern.fullmatch(name):
            if _is_abandoned(folder.parent / name, match[1], int(match[2])):
                _remove(folder.parent / name)
            else:
                is_alone = False
    return is_alone


def _new_scratch(folder: Path) -> tuple[Path, int]:
    """A new scratch folder, and the descriptor whose lock says that its process lives."""
    scratch = folder.with_name(_scratch_name(folder))
    os.mkdir(scratch)
    lock = os.open(scratch, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # a network file system may lock no folders: the names tell them apart
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return scratch, lock


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """While one process looks for others and makes itself known, no second one does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_abandoned(scratch: Path, host: str, process: int) -> bool:
    try:
        descriptor = os.open(scratch, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # gone, or a link
        return True
    is_here = host == _host()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return not psutil.pid_exists(process) if is_here else _is_old(scratch)
    finally:
        os.close(descriptor)
    return is_here or _is_old(scratch)


def _is_old(scratch: Path) -> bool:
    """By the clock that stamps the files, which may be neither this machine's nor the other's."""
    newest = max((path.lstat().st_mtime for path in (scratch, *scratch.rglob("*"))), default=0.0)
    os.utime(scratch.parent)
    return scratch.parent.stat().st_mtime - newest > _ABANDONED_SECONDS


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _settle(scratch: Path) -> None:
    """Modes as of any new file (safetensors makes its own unreadable for others), and everything on the disk."""
    mode = stat.S_IMODE(scratch.stat().st_mode) & 0o666
    for above, _, names in os.walk(scratch):
        for name in names:
            os.chmod(Path(above, name), mode)
            _sync(Path(above, name))
        _sync(Path(above))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of folders, on some file systems
            raise
    finally:
        os.close(descriptor)


def _scratch_name(path: Path) -> str:
    return f".{path.name[:_SHORT_CHARACTERS]}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}"


def _host() -> str:
    return re.sub(r"[^\w-]", "-", socket.gethostname())[:_SHORT_CHARACTERS] or "host"


# --------------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def new_file(path: Path, replaces: bool = True) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` when the block ends, and is removed when it fails.

    Args:
        replaces: whatever else has the name by then; otherwise it stays, and the new file goes.

    Raises:
        OSError: it cannot be written, or a folder has the name; a FileExistsError for what is not replaced.
    """
    partial = path.with_name(_scratch_name(path))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.ExitStack() as on_failure:
        file = os.fdopen(os.open(partial, flags, 0o666), "wb")
        on_failure.callback(lambda: partial.unlink(missing_ok=True))
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replaces:
            os.replace(partial, path)
        else:
            _rename_to_new(partial, path)
        on_failure.pop_all()


def _rename_to_new(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)  # unlike a rename it fails where something has the name
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if os.path.lexists(path):  # a file system without links: two that do this at one moment may not meet
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(partial, path)
    else:
        partial.unlink()


def write_whole(path: Path, content: str | bytes, replaces: bool = True) -> None:
    """Write a file that readers find whole or not at all. Arguments and errors as of :func:`new_file`."""
    with new_file(path, replaces) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def open_to_append(path: Path) -> TextIO:
    """A text file, new or there already, to write at the end of.

    Raises:
        OSError: it cannot be written, is a link, no plain file, or has other names in other places.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EPERM, "it is no plain file of this folder alone", str(path))
    return os.fdopen(descriptor, "a", encoding="utf-8")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what an operating system says against writing ``path`` into a ``UserError``."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the operating system's: libraries use the class, too
            raise
        raise _refusal(path, error.errno, error.strerror or "", error) from error
    except SafetensorError as error:
        if (match := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise _refusal(path, int(match[1]), os.strerror(int(match[1])), error) from error


def refusal_of_disk(error: BaseException) -> UserError | None:
    """What to say of an error that nobody caught, a library's too, whose cause is a disk, a name, or a file's mode."""
    text = str(error)
    if isinstance(error, RuntimeError | ValueError) and ("Symlink loop" in text or "embedded null" in text):
        return UserError(f"there can be no such file ({text}): give another name")
    if not isinstance(error, OSError):
        return None
    where = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return UserError(f"there can be no such file ({error.strerror}{where}): give another name")
    if error.filename and error.errno in (errno.EACCES, errno.EPERM):
        return UserError(
            f"{error.filename} is not for this user ({error.strerror}): have its mode changed, or give another"
        )
    if error.errno not in (*NO_ROOM, errno.EROFS, errno.EIO, errno.ESTALE):
        return None
    return UserError(
        f"a file cannot be written ({error.strerror}{where}): free some room, or give folders on another disk, and run "
        "again"
    )


def _refusal(path: Path, number: int, reason: str, error: Exception) -> UserError:
    if number in NO_ROOM:
        with contextlib.suppress(OSError):
            above = next(folder for folder in path.absolute().parents if folder.is_dir())
            reason += f"; {shutil.disk_usage(above).free:,} bytes are free"
        return UserError(f"{path} cannot be written ({reason}): free some room, or give a folder on another disk")
    where = getattr(error, "filename", None)
    reason += f": {where}" if where and str(where) != str(path) else ""
    return UserError(f"{path} cannot be written ({reason}): let it be written, or give another folder")
