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
import traceback
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from adalora_dist.config.sections import RunConfig
from adalora_dist.io.ending import EXIT_PREEMPTED, leave, repeat_last, tell_error
from adalora_dist.io.errors import UserError
from adalora_dist.io.launchers import follow, unfollow
from adalora_dist.io.marks import refuse_others
from adalora_dist.io.publish import write_whole
from adalora_dist.io.redaction import redacted
from adalora_dist.io.signals import SignalListener
from adalora_dist.io.terminal import let_go_of_terminal
from adalora_dist.training.faults.memory import memory_advice
from adalora_dist.training.faults.peers import BEAT_SECONDS, Peers
from adalora_dist.training.faults.run_lock import RunLock
from adalora_dist.training.faults.verdict import EXIT_PEER, Verdict

if TYPE_CHECKING:
    from adalora_dist.training.prepared import Prepared

STATUS_FILE = "ADALORA_DIST_STATUS_FILE"
"""Environment variable: where rank 0 writes that the run was pre-empted, since launchers change exit codes."""
_ENDED = "ended by a signal outside of training"


class Guard:
    """The lock on ``output_dir``, the watch over the other ranks, and what signals and errors do in this process.

    A process has one run at a time: where an earlier one has ended with an error that somebody caught, as notebooks do,
    its guard is closed here.

    Raises:
        UserError: on rank 0, if ``output_dir`` is in use by a living run.
    """

    _open: ClassVar[Guard | None] = None

    def __init__(self, accelerator: Accelerator, config: RunConfig) -> None:
        if Guard._open is not None:
            Guard._open.close()
        self._accelerator, self._config = accelerator, config
        self._prepared: Prepared | None = None
        self._in_loop = self._closed = self._is_end_said = False
        self._ending = threading.Lock()
        """Held from the moment at which this process ends because of a signal."""
        self._lock: RunLock | None = None
        rank, world_size = accelerator.process_index, accelerator.num_processes
        timeout = config.train.peer_timeout_seconds
        self._peers = Peers(rank, world_size, timeout, _from_rank_0, self._before_leaving)
        self._previous_hook, sys.excepthook = sys.excepthook, self._on_error
        atexit.register(self._on_exit)
        self._signals = SignalListener(self._on_signal)
        follow(self._on_orphaned)
        Guard._open = self
        if accelerator.is_main_process:
            self._lock = RunLock(Path(config.train.output_dir))
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
            self._end_now(_ENDED)

    def leave_preempted(self, step: int) -> NoReturn:
        """All ranks have saved: say so and exit with ``EXIT_PREEMPTED``."""
        if self._accelerator.is_main_process:
            line = f"stopped by a signal after step {step}; run again with --resume auto"
            print(line, flush=True)
            _write_status(step)
            repeat_last(line)
        if self._prepared is not None:
            self._prepared.hooks.detach()
        self._accelerator.end_training()
        self._signals.ignore()  # launchers send it again as soon as the first process has ended
        self.close()
        raise SystemExit(EXIT_PREEMPTED)

    def close(self) -> None:
        """The run has ended as it should: undo everything."""
        if self._closed:
            return
        self._closed = True
        if Guard._open is self:
            Guard._open = None
        self._peers.close()
        if self._lock is not None:
            self._lock.release()
        sys.excepthook = self._previous_hook
        atexit.unregister(self._on_exit)
        unfollow(self._on_orphaned)
        self._signals.close()

    # -------------------------------------------------------------------------------------- when something happens

    def _on_signal(self, number: int, again: bool) -> None:
        """By the thread that hears signals."""
        if number == signal.SIGHUP:
            let_go_of_terminal()
        if again:
            self._end_now("ended at once by a second Ctrl-C")
        if self._in_loop:
            self._peers.ask_to_stop()
        if not self._in_loop:  # not at all, or no longer
            self._end_now(_ENDED)

    def _on_orphaned(self) -> None:
        self._on_signal(signal.SIGTERM, again=False)

    def _end_now(self, what: str) -> NoReturn:
        """There is nothing to save that the newest checkpoint does not have. Nothing is unwound, as libraries may
        hold up or swallow what is raised anywhere in them: files are written such that a killed process may leave
        them at any time."""
        self._ending.acquire()  # noqa: SIM115 (never released: whoever else comes here waits for the end)
        if self._peers.verdict is None:
            self._say_ended(what)
        self._peers.report(what, EXIT_PREEMPTED)
        if self._lock is not None:
            self._lock.release()
        leave(EXIT_PREEMPTED)

    def _say_ended(self, what: str) -> None:
        """On the main process, once."""
        if self._accelerator.is_main_process and not self._is_end_said:
            self._is_end_said = True
            line = f"{what}; run again with --resume auto"
            print(f"\n{line}", file=sys.stderr, flush=True)
            _write_status(None)
            repeat_last(line)

    def _before_leaving(self, verdict: Verdict) -> None:
        if verdict.code == EXIT_PREEMPTED:
            self._say_ended(verdict.text)
        if self._lock is not None:
            self._lock.release()

    def _on_error(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """An error that nobody caught: the rank where it happened first shows it, the others leave in silence."""
        self._wait_if_ending()
        self._closed = True
        reason = redacted(" ".join(str(error).split())[:200])
        verdict = self._peers.report(f"{kind.__name__}: {reason}", EXIT_PEER, follows=_is_broken_collective(error))
        rank = self._accelerator.process_index
        if verdict is not None and verdict.rank != rank:
            time.sleep(4 * BEAT_SECONDS)  # the watch ends this process meanwhile
            leave(EXIT_PEER)
        where = f"rank {rank}: " if self._accelerator.num_processes > 1 else ""
        print(file=sys.stderr)  # after a progress bar
        if _is_out_of_memory(error):
            advice = memory_advice(self._accelerator, self._config, self._prepared, self._peers.step)
            tell_error(f"{where}{kind.__name__} ({reason}): {advice}")
        else:
            self._show(kind, error, trace)
            repeat_last(f"error: {where}{kind.__name__}: {reason}")
        if self._lock is not None:
            self._lock.release()
        if self._accelerator.num_processes > 1:
            time.sleep(BEAT_SECONDS)
            leave(1)

    def _show(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if self._previous_hook is not sys.__excepthook__:
            self._previous_hook(kind, error, trace)
            return
        lines = traceback.format_exception(kind, error, trace)
        print(redacted("".join(lines)), end="", file=sys.stderr, flush=True)

    def _on_exit(self) -> None:
        """The interpreter ends before the run has: the others must not wait."""
        self._wait_if_ending()
        if not self._closed:
            self._peers.report("it has ended early", EXIT_PEER)
            if self._lock is not None:
                self._lock.release()

    def _wait_if_ending(self) -> None:
        if self._ending.locked():
            self._ending.acquire()

    def _keep(self) -> None:
        """A thread: show that the folder's owner lives, and end where it was taken for dead."""
        while not self._closed:
            if self._lock is not None and not self._lock.touch():
                self._lose_folder()
            time.sleep(BEAT_SECONDS)

    def _lose_folder(self) -> NoReturn:
        self._ending.acquire()  # noqa: SIM115 (never released, as in _end_now)
        text = f"output_dir={self._config.train.output_dir} has been taken over by another run while this one slept"
        tell_error(text)
        self._peers.report(text, EXIT_PEER)
        leave(1)


def _from_rank_0(value: Any) -> Any:
    return broadcast_object_list([value])[0]


def _write_status(step: int | None) -> None:
    """Where it cannot be written, a warning is all: the exit code says the same, and must not become another."""
    if path := os.environ.get(STATUS_FILE):
        try:
            refuse_others(Path(path), b'"num_finished_steps"', "give the variable another name")
            write_whole(Path(path), json.dumps({"status": "preempted", "num_finished_steps": step}) + "\n")
        except (UserError, OSError, ValueError) as error:  # ValueError: a name that is none
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
