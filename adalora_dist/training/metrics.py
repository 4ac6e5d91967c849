"""What a run measures of its steps: kept on the device, and read together at log lines, so that no step waits."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

from adalora_dist.config.sections import TrainConfig
from adalora_dist.io.progress import duration
from adalora_dist.methods.protocol import Step
from adalora_dist.sharding.tensors import norm_share
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.training.prepared import Prepared, learning_rate

GIB = 1 << 30


class StepMetrics:
    """The records of metrics.jsonl, one per step.

    Args:
        past: the records of the steps that a continued run has behind it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        prepared: Prepared,
        train: TrainConfig,
        plan: BatchPlan,
        num_steps: int,
        past: Sequence[bytes],
    ) -> None:
        self._accelerator, self._prepared, self._train, self._plan = accelerator, prepared, train, plan
        self._num_steps, self._steps_per_epoch = num_steps, plan.num_steps(1.0)
        earlier = [json.loads(line) for line in past]
        self.losses: list[float] = [record["loss"] for record in earlier]
        """Of each step that has been read: the mean over the targets of the global batch."""
        self._first_step = len(self.losses)
        self._seconds_before = float(earlier[-1].get("seconds", 0.0)) if earlier else 0.0
        self._losses: list[torch.Tensor] = []  # loss sums of this process, unread
        self._norms: list[Any] = []  # of the gradient before clipping, unread; None where the engine does not tell
        self._num_tokens, self._started = 0, time.monotonic()
        self._seconds_read = 0.0  # of this process, at the last log line
        self._peak_gib = 0.0

    def add(self, step: int, loss: torch.Tensor, norm: Any) -> None:
        """A step is done. Nothing is read.

        Args:
            loss: scalar, this process's part of the mean over the global batch's targets.
            norm: of the whole gradient before clipping, as the engine has it; None: not known.
        """
        self._losses.append(loss)
        self._norms.append(norm)
        self._num_tokens += sum(self._plan.lengths[row] for row in self._plan.batch(step))

    @contextmanager
    def paused(self) -> Any:
        """Around what is not training: it does not count."""
        began = time.monotonic()
        yield
        self._started += time.monotonic() - began

    def read(self) -> list[dict[str, Any]]:
        """Records of the steps since the last call, the last of them with what is measured at log lines. Collective."""
        first = len(self.losses)
        sums = torch.stack([*self._losses, *(self._share(norm) for norm in self._norms)])
        read = self._accelerator.reduce(sums, reduction="sum").tolist()
        losses, squares = read[: len(self._losses)], read[len(self._losses) :]
        known = [norm is not None for norm in self._norms]
        self._losses, self._norms = [], []
        self._peak_gib = self._peak()
        seconds = self.seconds
        each = (seconds - self._seconds_read) / len(losses)  # only the time of log lines is measured
        records, method_step = [], self._prepared.hooks.method_step
        for k, (step, loss) in enumerate(enumerate(losses, first)):
            record: dict[str, Any] = {
                "step": step,
                "loss": loss,
                "learning_rate": learning_rate(self._train, step, self._num_steps) * method_step.rate_factor(step),
                "tokens_per_second": round(self.tokens_per_second, 1),
                "epoch": round((step + 1) / self._steps_per_epoch, 4),
                "seconds": round(self._seconds_before + self._seconds_read + each * (k + 1), 2),
                "peak_memory_gib": round(self._peak_gib, 3),
            }
            if known[k] and math.isfinite(squares[k]):
                record["gradient_norm"] = math.sqrt(squares[k])
            records.append(record | method_step.record(step))
        records[-1] |= method_step.report()
        self.losses += losses
        self._seconds_read = seconds
        return records

    def _share(self, norm: Any) -> torch.Tensor:
        device = self._accelerator.device
        if norm is None:
            return torch.zeros((), device=device)
        return norm_share(torch.as_tensor(norm, device=device)).to(torch.float32)

    @property
    def seconds(self) -> float:
        """Of training in this process, without evaluations."""
        return time.monotonic() - self._started

    @property
    def seconds_left(self) -> float:
        """For the steps that are left, at the speed so far."""
        done = len(self.losses) - self._first_step
        return self.seconds / max(1, done) * (self._num_steps - len(self.losses))

    @property
    def tokens_per_second(self) -> float:
        return self._num_tokens / self.seconds

    def summary(self) -> str:
        """The end of a run in one line: time, tokens, memory. Of this process, if the run was continued."""
        whole = self._seconds_before + self.seconds
        where = "of GPU memory" if self._accelerator.device.type == "cuda" else "of memory"
        return (
            f"Trained {len(self.losses):,} steps in {duration(whole)}; {self._num_tokens:,} tokens at "
            f"{self.tokens_per_second:,.0f} tokens/s; at most {self._peak_gib:.2f} GiB {where} in a process"
        )

    def _peak(self) -> float:
        """GiB, the most that any process has used: of GPU memory, or of its own on a CPU."""
        device = self._accelerator.device
        if device.type == "cuda":
            peak = float(torch.cuda.max_memory_allocated(device))
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
        peaks = self._accelerator.gather(torch.tensor([peak / GIB], device=device))
        return float(peaks.max())


def log_ranks(accelerator: Accelerator, method_step: Step, step: int) -> None:
    """A histogram of the ranks of all matrices, in the trackers that have such; all have mean and extremes."""
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            log_histogram(tracker.name, tracker.tracker, "ranks", list(method_step.rank_pattern().values()), step)


def log_histogram(tracker: str, writer: Any, name: str, ranks: list[int], step: int, axis: str | None = None) -> None:
    """Nothing without ranks, and in a tracker that has no histograms.

    Args:
        tracker: its name.
        writer: its own: a SummaryWriter of TensorBoard's, or wandb's run.
        axis: the name under which wandb is told the step, as transformers has it; None: it is wandb's own.
    """
    if not ranks:
        return
    if tracker == "tensorboard":
        writer.add_histogram(name, torch.tensor(ranks), step)
    elif tracker == "wandb":
        import wandb

        shown: dict[str, Any] = {name: wandb.Histogram(ranks)}
        if axis is None:
            writer.log(shown, step=step)
        else:
            writer.log(shown | {axis: step})
