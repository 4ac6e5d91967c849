"""What keeps a run from ending badly: one run per folder, no rank that waits for another's end, signals that save.

    guard = Guard(accelerator, config)            once, before anything else is made
    ...
    if guard.stops_after(step):                   in the loop: save, then guard.leave_preempted(step)
    ...
    guard.close()                                 at the end

An error anywhere is shown once, by the rank that it happened on, and every rank ends. See ``docs/reliability.md``.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from adalora_dist.config.sections import RunConfig
from adalora_dist.io.publish import write_whole
from adalora_dist.training.faults.memory import memory_advice
from adalora_dist.training.faults.peers import BEAT_SECONDS, Peers
from adalora_dist.training.faults.run_lock import RunLock
from adalora_dist.training.faults.verdict import EXIT_PEER, EXIT_PREEMPTED, leave

if TYPE_CHECKING:
    from adalora_dist.training.prepared import Prepared

STATUS_FILE = "ADALORA_DIST_STATUS_FILE"
"""Environment variable: where rank 0 writes that the run was pre-empted, since launchers change exit codes."""


class Guard:
    """The lock on ``output_dir``, the watch over the other ranks, and what signals and errors do in this process.

    Raises:
        UserError: on rank 0, if ``output_dir`` is in use by a living run.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig) -> None:
        self._accelerator, self._config = accelerator, config
        self._prepared: Prepared | None = None
        self._in_loop = self._closed = self._preempted = False
        self._lock: RunLock | None = None
        rank, world_size = accelerator.process_index, accelerator.num_processes
        self._peers = Peers(rank, world_size, config.train.peer_timeout_seconds, _from_rank_0)
        self._previous_hook, sys.excepthook = sys.excepthook, self._on_error
        atexit.register(self._on_exit)
        self._previous_handlers = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGUSR1)
        }
        if accelerator.is_main_process:
            self._lock = RunLock(Path(config.train.output_dir))
        self._launchers = _launchers() if _is_launched() else None
        threading.Thread(target=self._keep, name="guard", daemon=True).start()

    # ------------------------------------------------------------------------------------------- for the loop

    def begin(self, prepared: Prepared, num_finished_steps: int = 0) -> None:
        """The training loop starts: from here on a signal stops it at the end of a step."""
        self._prepared = prepared
        self._peers.step = num_finished_steps
        self._in_loop = True

    def stops_after(self, step: int) -> bool:
        """After ``step`` finished steps: whether all ranks are to save and leave here. Equal on all ranks."""
        return self._peers.stops_after(step)

    def end(self) -> None:
        """The training loop has ended: from here on a signal ends the process at once."""
        self._in_loop = False
        if self._peers.asked:
            self._on_signal(signal.SIGTERM, None)

    def leave_preempted(self, step: int) -> NoReturn:
        """All ranks have saved: say so and exit with ``EXIT_PREEMPTED``."""
        self._accelerator.print(f"stopped by a signal after step {step}; run again with --resume auto", flush=True)
        if self._accelerator.is_main_process:
            _write_status(step)
        if self._prepared is not None:
            self._prepared.hooks.detach()
        self._accelerator.end_training()
        self.close()
        for number in self._previous_handlers:  # launchers send it again as soon as the first process has ended
            signal.signal(number, signal.SIG_IGN)
        raise SystemExit(EXIT_PREEMPTED)

    def close(self) -> None:
        """The run has ended as it should: undo everything."""
        if self._closed:
            return
        self._closed = True
        self._peers.close()
        if self._lock is not None:
            self._lock.release()
        sys.excepthook = self._previous_hook
        atexit.unregister(self._on_exit)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)

    # -------------------------------------------------------------------------------------- when something happens

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._in_loop:
            self._peers.ask_to_stop()
            return
        self._preempted = True  # there is nothing to save that the newest checkpoint does not have
        if self._accelerator.is_main_process:
            _write_status(None)
        raise SystemExit(EXIT_PREEMPTED)

    def _on_error(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """An error that nobody caught: the rank where it happened first shows it, the others leave in silence."""
        self._closed = True
        reason = " ".join(str(error).split())[:200]
        verdict = self._peers.report(f"{kind.__name__}: {reason}", EXIT_PEER, follows=_is_broken_collective(error))
        rank = self._accelerator.process_index
        if verdict is not None and verdict.rank != rank:
            time.sleep(4 * BEAT_SECONDS)  # the watch ends this process meanwhile
            leave(EXIT_PEER)
        where = f"rank {rank}: " if self._accelerator.num_processes > 1 else ""
        if _is_out_of_memory(error):
            advice = memory_advice(self._accelerator, self._config, self._prepared, self._peers.step)
            print(f"\nerror: {where}{kind.__name__} ({reason}): {advice}", file=sys.stderr, flush=True)
        else:
            print(file=sys.stderr)  # after a progress bar
            self._previous_hook(kind, error, trace)
        if self._lock is not None:
            self._lock.release()
        if self._accelerator.num_processes > 1:
            time.sleep(BEAT_SECONDS)
            leave(1)

    def _on_exit(self) -> None:
        """The interpreter ends before the run has: the others must not wait."""
        if not self._closed:
            code = EXIT_PREEMPTED if self._preempted else EXIT_PEER
            if self._preempted and self._accelerator.is_main_process:
                print("\nended by a signal outside of training; run again with --resume auto", flush=True)
            self._peers.report("it has ended early", code)
            if self._lock is not None:
                self._lock.release()

    def _keep(self) -> None:
        """A thread: show that the folder's owner lives; take a launcher that is gone for a request to stop."""
        while not self._closed:
            if self._lock is not None:
                self._lock.touch()
            if self._launchers is not None and _launchers() != self._launchers:
                self._launchers = None
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(BEAT_SECONDS)


def _from_rank_0(value: Any) -> Any:
    return broadcast_object_list([value])[0]


def _is_launched() -> bool:
    """Started by a launcher, whose end means that nobody waits for this process any more."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _launchers() -> list[int]:
    """The processes that started this one: its parent, and where that is the half of DeepSpeed's launcher that starts
    processes, the other half, which the user sees and ends."""
    parent = os.getppid()
    try:
        process = psutil.Process(parent)
        return [parent, process.ppid()] if "deepspeed.launcher.launch" in process.cmdline() else [parent]
    except psutil.Error:
        return [parent]


def _write_status(step: int | None) -> None:
    """Where it cannot be written, a warning is all: the exit code says the same, and must not become another."""
    if path := os.environ.get(STATUS_FILE):
        try:
            write_whole(Path(path), json.dumps({"status": "preempted", "num_finished_steps": step}) + "\n")
        except (OSError, ValueError) as error:  # ValueError: a name that is none
            print(f"warning: {STATUS_FILE}={path!r} cannot be written ({error})", file=sys.stderr, flush=True)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _is_broken_collective(error: BaseException) -> bool:
    """What a rank sees when another one ends in the middle of a collective."""
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )
