"""Runs of the shared loop in which something goes wrong on purpose, on real processes that end as they would alone.

Unlike ``distributed.run_ranks``, which fails a test when a rank does, this looks at how every rank ends.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import set_seed
from torch import nn

from adalora_dist.config.flags import user_errors
from adalora_dist.config.methods import AdaLoraConfig
from adalora_dist.config.sections import ModelConfig, RunConfig, TrainConfig
from adalora_dist.methods.inject import adapt
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.tasks.losses import LossSum, causal_loss
from adalora_dist.training.engine import build_accelerator
from adalora_dist.training.faults.guard import Guard
from adalora_dist.training.loop import train
from adalora_dist.training.prepared import Prepared, prepare
from adalora_dist.training.resume import find_checkpoint
from adalora_dist.training.run_folder import RunFolder
from tests.support.kills import own_progress_lock
from tests.support.limits import HANG_SECONDS
from tests.support.quantized_runs import environment
from tests.support.settings import adapter_section
from tests.support.tiny_language_model import tiny_llama

STEPS, GLOBAL_BATCH, VOCABULARY, TARGET_BUDGET = 16, 8, 64, 14
HOLD_SECONDS = 4


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code (negative: a signal), everything it printed, and when (time.monotonic)."""

    code: int
    log: str
    when: float


class Ranks:
    """``fn(rank, world_size, *args)`` on forked gloo ranks, each ending like a program of its own."""

    def __init__(self, world_size: int, folder: Path, fn: Callable[..., Any], *args: Any) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.pids = []
        for rank in range(world_size):
            sys.stdout.flush()
            sys.stderr.flush()
            pid = os.fork()
            if pid == 0:
                _live(rank, world_size, folder, fn, args)
            self.pids.append(pid)
        self._ended: dict[int, tuple[int, float]] = {}

    def wait_for(self, name: str) -> None:
        """Until a rank has made the file ``name``."""
        deadline = time.monotonic() + HANG_SECONDS
        while True:
            self._look()  # first: a rank may make the file and end
            if (self.folder / name).exists():
                return
            if time.monotonic() > deadline or self._ended:
                self.kill()
                raise AssertionError("\n".join([f"no {name}", *(ended.log for ended in self.wait())]))
            time.sleep(0.005)

    def wait(self) -> list[Ended]:
        """How each rank ended. Those that hang are killed: code -9."""
        deadline = time.monotonic() + HANG_SECONDS
        while len(self._ended) < len(self.pids) and time.monotonic() < deadline:
            self._look()
            time.sleep(0.005)
        if len(self._ended) < len(self.pids):
            self.kill()
            while len(self._ended) < len(self.pids):
                self._look()
        logs = [(self.folder / f"{rank}.log").read_text() for rank in range(len(self.pids))]
        return [Ended(*(self._ended[p][0], log, self._ended[p][1])) for p, log in zip(self.pids, logs, strict=True)]

    def kill(self) -> None:
        for pid in self.pids:
            if pid not in self._ended:
                os.kill(pid, signal.SIGKILL)

    def _look(self) -> None:
        for pid in self.pids:
            if pid not in self._ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                self._ended[pid] = (os.waitstatus_to_exitcode(found[1]), time.monotonic())


def _live(rank: int, world_size: int, folder: Path, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The child's whole life, with the interpreter's own end. Never returns."""
    code = 1
    try:
        log = os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        atexit._clear()  # what the parent registered is not this program's
        own_progress_lock()
        torch.set_num_threads(1)
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT="0", GLOO_SOCKET_IFNAME="lo",
        )  # fmt: skip
        if world_size > 1:
            init = f"file://{folder / f'rendezvous-{os.getppid()}'}"
            timeout = timedelta(seconds=600)
            dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world_size, timeout=timeout)
        try:
            fn(rank, world_size, *args)
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 1
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        atexit._run_exitfuncs()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ----------------------------------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Fault:
    """What goes wrong, in the forward of one step, on one rank (None: on all)."""

    kind: str = "none"
    step: int = 5
    rank: int | None = 1
    num_steps: int = 1

    def hits(self, step: int, rank: int) -> bool:
        return self.step <= step < self.step + self.num_steps and self.rank in (None, rank)


def rows() -> list[dict[str, list[int]]]:
    sequences = [[3 + (k + 7 * i * (1 + k % 3)) % 30 for i in range(5 + k % 4)] for k in range(3 * GLOBAL_BATCH)]
    return [{"input_ids": ids, "labels": ids} for ids in sequences]


def configuration(folder: Path, **changes: Any) -> RunConfig:
    """Any setting of adapter or train can be changed."""
    adapter: dict[str, Any] = dict(
        init_rank=3, target_rank=1, targets=("all-linear",), start="paper", init="orthonormal", initial_warmup_steps=2,
        final_steps=4, mask_interval_steps=2,
    )  # fmt: skip
    training: dict[str, Any] = dict(
        output_dir=str(folder / "run"), max_steps=STEPS, batch_size=GLOBAL_BATCH, micro_batch_size=GLOBAL_BATCH,
        learning_rate=2e-2, lr_warmup_ratio=0, log_every=4,
    )  # fmt: skip
    for name, value in changes.items():
        (adapter if name in AdaLoraConfig.model_fields else training)[name] = value
    return RunConfig(model=ModelConfig(name="tiny"), adapter=adapter_section(**adapter), train=TrainConfig(**training))


def run(
    rank: int,
    world_size: int,
    folder: Path,
    engine: str = "ddp",
    fault: Fault = Fault(),
    changes: dict[str, Any] | None = None,
    look: Callable[[Prepared, int], None] | None = None,
) -> None:
    """A whole run with a guard, as a recipe has it. ``look(prepared, step)`` sees each step's start.

    Leaves what it has learnt in ``final.pt``.
    """
    os.environ.update(environment(engine))
    config = configuration(folder, **(changes or {}))
    with user_errors():
        accelerator = build_accelerator(config.train)
        guard = Guard(accelerator, config)
        resumed = find_checkpoint(config)
        set_seed(config.train.seed)
        model = tiny_llama(VOCABULARY)
        adapt(model, config.adapter, config.train.seed)
        data = rows()
        plan = BatchPlan.of_rows(data, config.train.batch_size, config.train.seed)
        prepared = prepare(accelerator, model, config, STEPS, resumed)
        run_folder = RunFolder(config, accelerator.is_main_process, {}, resumed)
        loss_sum = _with_fault(causal_loss(data, 0, accelerator.device), fault, rank, folder, prepared, look, guard)
        losses = train(accelerator, prepared, plan, loss_sum, config, run_folder, print, guard=guard)
        assert int(sum(prepared.hooks.method_step.rank_pattern().values())) == TARGET_BUDGET
        learnt = {a.name: torch.cat([a.P.flatten(), a.lam, a.Q.flatten()]) for a in prepared.hooks.updates()}
        patterns = {f"pattern {a.step}": a.keep for a in prepared.hooks.method_step.allocations}
        if rank == 0:
            torch.save({"losses": torch.tensor(losses), **patterns, **learnt}, folder / "final.pt")
        (folder / f"published-{rank}").touch()
        accelerator.end_training()
        guard.close()


def is_told_to_stop(guard: Guard) -> bool:
    """Whether this rank's loop will stop: the signal that asks for it has been heard, here or by another rank."""
    peers = guard._peers
    return peers._all_asked or (peers.asked and peers.world_size == 1)


def _with_fault(
    loss_sum: LossSum, fault: Fault, rank: int, folder: Path, prepared: Prepared, look: Any, guard: Guard
) -> LossSum:
    """One forward per step: the count of calls is the step."""
    count, now = iter(range(0 if prepared.resumed is None else prepared.resumed.step, STEPS)), [-1]

    def poison(layer: nn.Module, args: Any) -> None:
        """The gradient of one parameter, of this rank alone."""
        if fault.kind == "gradient" and fault.hits(now[0], rank):
            # The parameter, and with it the hook, may outlive the step.
            layer.lambdas.lam.register_hook(lambda g: g * math.nan if fault.hits(now[0], rank) else g)

    prepared.hooks.method_step.layers[0].register_forward_pre_hook(poison)

    def faulty(model: nn.Module, indices: list[int]) -> torch.Tensor:
        now[0] = step = next(count)
        if look is not None:
            look(prepared, step)
        (folder / f"step-{step}-{rank}").touch()
        loss = loss_sum(model, indices)
        if not fault.hits(step, rank):
            return loss
        match fault.kind:
            case "nan" | "inf":
                return loss * (math.nan if fault.kind == "nan" else math.inf)
            case "raise":
                raise KeyError("a broken row")
            case "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            case "exit":
                raise SystemExit(3)
            case "hang":
                time.sleep(3600)
            case "disk":  # no file may grow beyond this from now on
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            case "slow":
                time.sleep(0.2)
            case "endless":  # slow, and never over before this rank has been told to stop
                time.sleep(0.2)
                while step == STEPS - 2 and not is_told_to_stop(guard):
                    time.sleep(0.01)
            case "hold":  # the interpreter's lock, as an extension may: no other thread of this process runs
                ctypes.PyDLL(None).usleep(HOLD_SECONDS * 1_000_000)
        return loss

    return faulty


# ------------------------------------------------------------------------------------- looking and meddling


class Untouched:
    """Looks at the state before and after the bad step, in the rank itself. Needs ``compact`` to be off."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.compared = fault, False

    def __call__(self, prepared: Prepared, step: int) -> None:
        if step == self.fault.step:
            self.before = _state(prepared)
        if step == self.fault.step + 1:
            after, keep = _state(prepared), prepared.hooks.method_step.keep
            assert prepared.hooks.num_skipped_steps == 1
            for name, tensors in self.before.items():
                for old, new in zip(tensors, after[name], strict=True):
                    # a pruning that was due happens nevertheless: lambda of what is not kept becomes 0
                    masked = name == "weights" and keep is not None and not new[new != old].any()
                    assert torch.equal(old, new) or masked
            assert sum(t.numel() for t in self.before["averages"]) > 0
            print("compared")


def _state(prepared: Prepared) -> dict[str, list[torch.Tensor]]:
    hooks, states = prepared.hooks, prepared.inner_optimizer.state.values()
    allocator = hooks.method_step
    moments = [t.to_local() if hasattr(t, "to_local") else t for s in states for t in s.values() if torch.is_tensor(t)]
    return {
        "weights": [t.detach().clone() for t in hooks.engine.values()],
        "averages": [allocator.bound.sensitivity.clone(), allocator.bound.uncertainty.clone()],
        "moments": [t.detach().clone() for t in moments],
    }


def corrupt(what: str, at_step: int) -> Any:
    """On rank 1 alone, change the pattern or a lambda behind the allocator's back."""

    def look(prepared: Prepared, step: int) -> None:
        if step != at_step or torch.distributed.get_rank() != 1:
            return
        hooks, allocator = prepared.hooks, prepared.hooks.method_step
        if what == "keep":
            allocator.keep = allocator.keep.clone()
            kept, pruned = allocator.keep.int().argmax(), allocator.keep.int().argmin()
            allocator.keep[kept], allocator.keep[pruned] = False, True
        else:
            with torch.no_grad():
                hooks.engine.values()[allocator.bound.lams[0]].add_(0.5)

    return look
