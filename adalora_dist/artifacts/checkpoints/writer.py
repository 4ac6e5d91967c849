"""Checkpoints of a run on any engine, to be continued on any engine and number of processes.

A checkpoint is a folder (``files.py`` says how it comes into being) of

- ``shard-K-of-N.safetensors``: what rank K held (``content.py``); its metadata gives the [start, stop) of
  every parameter. Replicas are written once. The first shard also has all selections of triplets (patterns).
- ``state.json``: step and counters, the shape and optimizer step of every parameter, which of the original triplets
  each matrix holds, and what the caller wants to find again (``run``).
- files of the caller's, and ``manifest.json``.

The frozen backbone is not stored.
"""

from __future__ import annotations

import json
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save as to_safetensors

from adalora_dist.artifacts.checkpoints import files as files
from adalora_dist.artifacts.checkpoints.content import Checkpoint, Shard, snapshot, writes_shard
from adalora_dist.artifacts.checkpoints.schema import STATE, check_content
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import read_object
from adalora_dist.io.publish import NO_ROOM, refuse_link, writing
from adalora_dist.methods.hooks import MethodHooks
from adalora_dist.sharding import select_engine
from adalora_dist.sharding.agreement import agreed, this_rank, world_size

T = TypeVar("T")

# ------------------------------------------------------------------------------------------------------------ finding


Accepts = Callable[[Checkpoint], None]
"""Raises ``files.Damaged`` for a checkpoint that is whole but cannot be what it says."""


def newest_checkpoint(root: Path, accepts: Accepts | None = None) -> Checkpoint | None:
    """The newest whole checkpoint among those in ``root``; None if there is none, whole or not. Collective.

    The main process reads and verifies; damaged ones are passed over with a warning.

    Args:
        accepts: what the caller asks of it besides; one that it refuses counts as damaged.

    Raises:
        UserError: there are checkpoints, and none can be used.
    """

    def find() -> str | None:
        problems = []
        for folder in files.checkpoints_in(root):
            try:
                _verify(folder, accepts)
            except files.Damaged as damage:
                problems.append(str(damage))
                continue
            for problem in problems:
                warnings.warn(f"{problem}: continuing from {folder.name}", stacklevel=2)
            return str(folder)
        if problems:
            raise UserError(
                f"no checkpoint in {root} can be used ({'; '.join(problems)}): bring one back from a copy, or start "
                "anew in another --output-dir or with --overwrite"
            )
        return None

    found = agreed(find if this_rank() == 0 else lambda: None)[0]
    return None if found is None else _opened(Path(found))


def checkpoint_at(folder: Path, accepts: Accepts | None = None) -> Checkpoint:
    """The checkpoint in ``folder``, and no other. Collective. ``accepts`` as of :func:`newest_checkpoint`.

    Raises:
        UserError: it is not a whole checkpoint; the message names the file.
    """

    def check() -> None:
        try:
            _verify(folder, accepts)
        except files.Damaged as damage:
            raise UserError(f"{damage}: give another checkpoint's path, or the run folder for its newest") from None

    agreed(check if this_rank() == 0 else lambda: None)
    return _opened(folder)


def _verify(folder: Path, accepts: Accepts | None) -> None:
    files.verify(folder)
    names = tuple(files.read_manifest(folder))
    state = check_content(folder, names)
    if accepts is not None:
        accepts(Checkpoint(folder, state["step"], state, names))


def set_newer_aside(checkpoint: Checkpoint, root: Path | None = None) -> None:
    """Rename the later checkpoints beside this one, or in ``root``: a run that continues from it writes its own."""
    for other in files.checkpoints_in(root or checkpoint.path.parent):
        if (files.step_of(other) or 0) > checkpoint.step:
            files.set_aside(other)


def copy_checkpoint(folder: Path, to: Path) -> None:
    """Copy a verified checkpoint into another run. For the main process.

    Raises:
        UserError: it is missing or damaged, or cannot be copied; the message names the file.
    """
    try:
        files.verify(folder)
    except files.Damaged as damage:
        raise UserError(f"{damage}: bring it back from a copy, or give another checkpoint") from None
    with writing(to):
        partial = files.start(to.parent, files.step_of(folder) or 0)
        for path in (folder / name for name in [*files.read_manifest(folder), files.MANIFEST]):
            files.write_file(partial / path.name, path.read_bytes())
        partial.rename(to)


def _opened(folder: Path) -> Checkpoint:
    def read() -> Checkpoint:
        try:
            names = tuple(files.read_manifest(folder))
        except files.Damaged as damage:
            raise UserError(f"{damage}: all processes must see the same folder") from None
        state = read_object(folder / STATE)
        return Checkpoint(folder, state["step"], state, names)

    checkpoint: Checkpoint = agreed(read, keep=False)
    return checkpoint


# ------------------------------------------------------------------------------------------------------------- saving


def _no_room(root: Path, needed_bytes: int, error: OSError) -> str:
    free_bytes = shutil.disk_usage(root if root.is_dir() else root.parent).free
    return (
        f"output_dir: a checkpoint needs {needed_bytes:,} bytes, {root} has {free_bytes:,} free ({error.strerror}): "
        "free some or lower keep_checkpoints, then continue with --resume auto; the checkpoint before this one is whole"
    )


class CheckpointWriter:
    """Writes checkpoints of one run.

    Args:
        root: folder of the checkpoints, the same for all processes.
        keep: how many to keep.
        asynchronous: write from a copy in CPU memory while training goes on; the next save waits for it.
    """

    def __init__(self, root: Path, keep: int, asynchronous: bool = False) -> None:
        self.root, self.keep, self.asynchronous = root, keep, asynchronous
        self.spared: set[int] = set()
        """Steps whose checkpoints stay, besides the newest."""
        # Processes agree over the CPU, and in a thread they must not use the group that training uses.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        parameters: Mapping[str, torch.Tensor],
        optimizer: Any,
        hooks: MethodHooks,
        run: Mapping[str, Any],
        extra: Mapping[str, bytes] | None = None,
    ) -> None:
        """Write the checkpoint of this moment, between two steps. Collective.

        Args:
            step: optimizer steps done.
            parameters: all that is trained, from :func:`trained_parameters`.
            optimizer: as the engine wraps it.
            hooks: of the method, bound.
            run: what JSON can hold, to be found again as :attr:`Checkpoint.run`; the main process's counts.
            extra: files to keep, by name; the main process's count.

        Raises:
            RuntimeError: on every process, if one cannot write. Earlier checkpoints are as they were.
        """
        self.wait()
        engine = select_engine(list(parameters.values()), optimizer)
        tensors, state = snapshot(step, list(parameters), engine, hooks)
        state["run"] = dict(run)
        main = {STATE: (json.dumps(state, indent=1) + "\n").encode(), **(extra or {})}
        shard = tensors if writes_shard(engine) else None
        if not self.asynchronous:
            self._write(state["step"], shard, main)
            return
        # Alone, an interpreter that ends after an error waits for it. With others it might wait for one that has died.
        work, is_alone = (state["step"], shard, main), not dist.is_initialized()
        self._thread = threading.Thread(target=self._write_and_remember, args=work, daemon=not is_alone)
        self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint that is being written is complete."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write_and_remember(self, *args: Any) -> None:
        try:
            self._write(*args)
        except BaseException as error:  # for the main thread
            self._error = error

    def _write(self, step: int, shard: Shard | None, main: Mapping[str, bytes]) -> None:
        """Every process its shard, then the main process the rest. All stop if one fails."""
        first = this_rank() == 0
        own_bytes = sum(t.nbytes for t in shard.tensors.values()) if shard is not None else 0
        own_bytes += sum(len(content) for content in main.values()) if first else 0

        def start() -> list[Any]:
            refuse_link(self.root)
            return [str(files.start(self.root, step)) if first else "", own_bytes]

        started = agreed(lambda: self._in_one_line(start, own_bytes), self._group)
        partial = started[0][0]
        try:
            self._fill(Path(partial), shard, main, sum(num_bytes for _, num_bytes in started))
        except Exception:
            if first:
                files.discard(Path(partial))  # it may be what fills the disk
            raise

    def _fill(self, partial: Path, shard: Shard | None, main: Mapping[str, bytes], needed_bytes: int) -> None:
        first = this_rank() == 0

        def write() -> list[tuple[str, int, str]]:
            written = []
            if shard is not None:
                name = f"shard-{this_rank():05d}-of-{world_size():05d}.safetensors"
                metadata = {"format": "pt", "spans": json.dumps(shard.spans)}
                written.append(files.write_file(partial / name, to_safetensors(shard.tensors, metadata)))
            if first:
                written += [files.write_file(partial / name, content) for name, content in main.items()]
            return [(file.name, file.size_bytes, file.sha256) for file in written]

        tables = agreed(lambda: self._in_one_line(write, needed_bytes), self._group)
        written = [files.Written(*file) for table in tables for file in table]

        def publish() -> None:
            files.publish(partial, written)
            files.rotate(self.root, self.keep, self.spared)

        agreed(lambda: self._in_one_line(publish, needed_bytes) if first else None, self._group)

    def _in_one_line(self, action: Callable[[], T], needed_bytes: int) -> T:
        """``action``, and what the operating system says against it as a ``UserError``."""
        with writing(self.root):
            try:
                return action()
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                raise UserError(_no_room(self.root, needed_bytes, error)) from error
