"""A thread in every process that tells the others it lives, so that the end of one never leaves the rest waiting.

The processes form a star around rank 0, over plain TCP beside the process group and independent of its backend. Each
sends a line of JSON every half second; nothing is ever unpickled. A process that is killed closes its connection and
is missed at once; one that is stopped falls silent and is missed after the timeout. As the lines come from a thread, a
long evaluation or compilation is not silence. Rank 0 decides what ended the run and tells everyone: the verdict. A
process that is not to blame leaves without a word, so the log holds one error.

Stopping on a signal is agreed through the same lines, without a collective: each thread promises that its loop will
wait at the end of its current step, rank 0 takes the latest of these steps, and all stop after it.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from adalora_dist.io.ending import leave, tell_error
from adalora_dist.training.faults.verdict import (
    EXIT_PEER,
    Identity,
    Line,
    Meeting,
    State,
    Verdict,
    is_missing,
    kill_stopped,
    listen,
    missed,
)

BEAT_SECONDS = 0.5


class _Hub:
    """What rank 0 has heard from the others."""

    def __init__(self, listener: socket.socket, token: str, timeout_seconds: float) -> None:
        self.states: dict[int, State] = {}
        self.lines: dict[int, Line] = {}
        self._token, self._timeout_seconds = token, timeout_seconds
        self._last_round = time.monotonic()
        self._heard: dict[int, float] = {}  # when, of those that have called and have not said goodbye
        self._lost: list[int] = []
        self._reports: dict[int, tuple[float, Verdict]] = {}
        self._identities: dict[int, Identity] = {}
        self._listener, self._selector = listener, selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def hear(self) -> None:
        """Take in what has come; waits for it for a fraction of a beat."""
        for key, _ in self._selector.select(timeout=BEAT_SECONDS / 5):
            if key.fileobj is self._listener:
                line = Line(self._listener.accept()[0], self._timeout_seconds, self._token)
                self._selector.register(line.socket, selectors.EVENT_READ, line)
                continue
            try:
                for message in key.data.receive():
                    self._take(key.data, message)
            except (EOFError, OSError, ValueError, TypeError, LookupError):  # the end, or a stranger's nonsense
                self._selector.unregister(key.fileobj)
                key.data.socket.close()
                rank = key.data.rank
                if rank is not None:
                    del self.lines[rank]
                    if rank in self._heard and self.states.get(rank, State()).report is None:
                        self._lost.append(rank)

    def _take(self, line: Line, message: dict[str, Any]) -> None:
        if line.rank is None:
            identity = Identity(*message["identity"])
            line.rank = identity.rank
            self.lines[line.rank], self._identities[line.rank] = line, identity
            self._heard[line.rank] = time.monotonic()
            return
        state = State(**message)
        self.states[line.rank] = state
        if state.done:
            self._heard.pop(line.rank, None)
        else:
            self._heard[line.rank] = time.monotonic()

    def judge(self, own_report: Mapping[str, Any] | None, now: float) -> Verdict | None:
        """Who ended the run, if it has ended.

        A rank that is gone outweighs what others report, which may follow from that; so reports wait for a moment.
        """
        if now - self._last_round > 4 * BEAT_SECONDS:  # this process was stopped itself: it could not hear
            self._heard = dict.fromkeys(self._heard, now)
        self._last_round = now
        if self._lost:
            return missed(self._lost[0], self._identities.get(self._lost[0]), None)
        for rank, when in self._heard.items():
            if is_missing(self._identities.get(rank), now - when, self._timeout_seconds):
                return missed(rank, self._identities.get(rank), now - when)
        reports = {0: own_report} | {rank: state.report for rank, state in self.states.items()}
        for rank, report in reports.items():
            if report is not None:
                self._reports.setdefault(rank, (now, Verdict(**report)))
        if not self._reports:
            return None
        when, verdict = min(self._reports.values(), key=lambda timed: (timed[1].follows, timed[0]))
        return verdict if now - when >= (2 if verdict.follows else 0.5) * BEAT_SECONDS else None

    def tell(self, verdict: Verdict | None, **rest: Any) -> None:
        for line in self.lines.values():
            try:
                line.send({"verdict": None if verdict is None else asdict(verdict), **rest})
            except OSError:
                continue  # its end shows when it is read


class Peers:
    """The processes of one run, seen from one of them.

    Args:
        rank, world_size: of this process.
        timeout_seconds: silence after which a process counts as stopped, unless it is seen to be slow.
        share: gives every rank what rank 0 puts in, through the process group; called once, here.
        before_leaving: called, by the thread that watches, when this process is about to end because of another.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        timeout_seconds: float,
        share: Callable[[Any], Any],
        before_leaving: Callable[[Verdict], None] = lambda verdict: None,
    ) -> None:
        self.rank, self.world_size, self.timeout_seconds = rank, world_size, timeout_seconds
        self._before_leaving = before_leaving
        self.step = 0
        """Finished steps of this process's loop."""
        self.asked = False  # to stop, by a signal
        self.verdict: Verdict | None = None
        self._own = State()
        self._stop_at: int | None = None
        self._all_asked = False
        self._lock = threading.Lock()
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None
        self._judged = threading.Event()  # a verdict, or the decision where to stop
        if world_size == 1:
            return
        host, self._me = os.environ.get("MASTER_ADDR", "127.0.0.1"), Identity.of_this_process(rank)
        self._listener = listen(host) if rank == 0 else None
        port = self._listener.getsockname()[1] if self._listener else 0
        self._meeting = Meeting(*share([host, port, secrets.token_hex(16), list(self._me)]))
        self._hub = Identity(*self._meeting.hub)
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    # --------------------------------------------------------------------------------- what the main thread calls

    def ask_to_stop(self) -> None:
        """Every rank is to stop at the same step. From any thread, without waiting: no lock is taken."""
        self.asked = self._own.asks = True

    def stops_after(self, step: int) -> bool:
        """This process has finished ``step`` steps: do all stop here? True on every rank at the same step."""
        with self._lock:
            self.step = step
            promise = self._own.promise
        if self.world_size == 1:
            return self._own.asks
        if promise is None or step < promise:
            return False
        while self._stop_at is None and self._thread is not None and self._thread.is_alive():
            self._judged.wait(BEAT_SECONDS)
        return self._stop_at is not None and step >= self._stop_at

    def report(self, text: str, code: int = EXIT_PEER, follows: bool = False) -> Verdict | None:
        """This process ends with an error: tell the others, and learn whether it was the first.

        None if nobody could be told.
        """
        if self._thread is None or not self._thread.is_alive():
            return None
        self._own.report = asdict(Verdict(self.rank, text, code, follows))
        self._changed.set()
        deadline = time.monotonic() + 6 * BEAT_SECONDS
        while self.verdict is None and time.monotonic() < deadline and self._thread.is_alive():
            self._judged.wait(BEAT_SECONDS / 10)
        return self.verdict

    def close(self) -> None:
        """The run has ended well: nobody misses this process from here on."""
        self._own.done = True
        self._changed.set()
        if self._thread is not None:
            self._thread.join(timeout=4 * BEAT_SECONDS)

    # ----------------------------------------------------------------------------------------------- the thread

    def _watch(self) -> None:
        try:
            if self._listener is not None:
                self._serve(self._listener)
            else:
                self._follow()
        except Exception as error:  # the watch itself must not end a run
            text = " ".join(str(error).split())
            print(f"warning: rank {self.rank} no longer watches the others ({text})", file=sys.stderr, flush=True)

    def _serve(self, listener: socket.socket) -> None:
        """Rank 0: hear all, decide, tell all. After its own end it waits for the others to learn of it."""
        hub = _Hub(listener, self._meeting.token, self.timeout_seconds)
        try:
            self._serve_with(hub)
        except Exception:
            hub.tell(None, asked=False, stop_at=None, done=True)  # or the others would take this for the end
            raise

    def _serve_with(self, hub: _Hub) -> None:
        next_beat, deadline = 0.0, float("inf")
        while not self._own.done or (hub.lines and time.monotonic() < deadline):
            hub.hear()
            states = [self._own, *hub.states.values()]
            now, verdict = time.monotonic(), None
            if self._own.done:
                deadline = min(deadline, now + 3 * BEAT_SECONDS)
            else:
                verdict = hub.judge(self._own.report, now)
                self._agree_on_a_step(states)
            if verdict is not None or now >= next_beat or self._changed.is_set():
                self._changed.clear()
                next_beat = now + BEAT_SECONDS
                hub.tell(asked=self._all_asked, stop_at=self._stop_at, verdict=verdict, done=self._own.done)
            if verdict is not None:
                self._end(verdict)
                return

    def _agree_on_a_step(self, states: Sequence[State]) -> None:
        if not self._all_asked and any(state.asks for state in states):
            self._learn({"asked": True, "stop_at": None})
        promises = [state.promise for state in states if state.promise is not None]
        if self._stop_at is None and len(promises) == self.world_size:
            self._learn({"asked": True, "stop_at": max(promises)})
            self._changed.set()

    def _follow(self) -> None:
        """Other ranks: tell rank 0, hear what it decides."""
        address = (self._meeting.host, self._meeting.port)
        line = Line(socket.create_connection(address, timeout=self.timeout_seconds), self.timeout_seconds)
        line.introduce(self._meeting.token)
        line.send({"identity": list(self._me)})
        selector = selectors.DefaultSelector()
        selector.register(line.socket, selectors.EVENT_READ)
        heard = last_round = next_beat = time.monotonic()
        while True:
            try:
                for message in line.receive() if selector.select(timeout=BEAT_SECONDS / 5) else []:
                    heard = time.monotonic()
                    if message["verdict"] is not None:
                        self._end(Verdict(**message["verdict"]))
                        return
                    if message["done"]:
                        return
                    self._learn(message)
                now = time.monotonic()
                if now >= next_beat or self._changed.is_set():
                    self._changed.clear()
                    next_beat = now + BEAT_SECONDS
                    line.send(asdict(self._own))
                if self._own.done:
                    return
            except (EOFError, OSError):
                if not self._own.done:
                    silent_seconds = time.monotonic() - heard
                    was_stopped = silent_seconds > self.timeout_seconds - BEAT_SECONDS  # and another rank killed it
                    self._end(missed(0, self._hub, silent_seconds if was_stopped else None))
                return
            if now - last_round > 4 * BEAT_SECONDS:  # this process was stopped itself
                heard = now
            last_round = now
            if is_missing(self._hub, now - heard, self.timeout_seconds):
                self._end(missed(0, self._hub, now - heard))
                return

    def _learn(self, message: Mapping[str, Any]) -> None:
        """Promise to stop, and where."""
        if message["asked"] and not self._all_asked:
            with self._lock:
                self._all_asked = True
                self._own.promise = self.step + 1
            self._changed.set()
        if message["stop_at"] is not None and self._stop_at is None:
            self._stop_at = message["stop_at"]
            self._judged.set()

    def _end(self, verdict: Verdict) -> None:
        """Leave because of another rank; a rank that reported itself speaks and leaves in its main thread."""
        self.verdict = verdict
        self._judged.set()
        if verdict.rank == self.rank and not verdict.is_gone:
            return
        if verdict.is_gone:
            # Of those that find rank 0 gone, one on each machine speaks.
            if self.rank == 0 or (verdict.rank == 0 and (self.rank == 1 or os.environ.get("LOCAL_RANK") == "0")):
                print(file=sys.stderr)  # after a progress bar
                tell_error(f"{verdict.text}; the run has ended on all ranks")
            kill_stopped(verdict.identity)
        self._before_leaving(verdict)
        time.sleep(BEAT_SECONDS)  # the rank to blame speaks first, and its launcher sees it end first
        leave(verdict.code)
