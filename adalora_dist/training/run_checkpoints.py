"""When a run writes checkpoints, and what it keeps in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from adalora_dist.artifacts.checkpoints.content import Checkpoint
from adalora_dist.artifacts.checkpoints.files import checkpoints_in, folder_name, step_of
from adalora_dist.artifacts.checkpoints.schema import STATE
from adalora_dist.artifacts.checkpoints.writer import CheckpointWriter, checkpoint_at, copy_checkpoint
from adalora_dist.artifacts.export import task_settings
from adalora_dist.config.sections import RunConfig, TrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import MAX_RECORDS_BYTES, read_bytes, read_object
from adalora_dist.io.redaction import redacted
from adalora_dist.sharding.agreement import agreed, this_rank
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.tasks.padding import unwrapped
from adalora_dist.training.best import BEST
from adalora_dist.training.resume import CHECKPOINTS, LOGS, backbone_identity, loss_scale


class RunCheckpoints:
    """Writes the checkpoints of one run: before its first step, every ``checkpoint_every`` steps, and at its end.

    Args:
        prepared: what trains (``training/loop.py``).
        plan: the rows of every step.
        num_steps: of the whole run.
        notes: what the recipe wants to find again as ``Checkpoint.run["notes"]``.
        keep_best: whether :meth:`save_best` is going to be called.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        prepared: Any,
        plan: BatchPlan,
        config: RunConfig,
        num_steps: int,
        notes: Mapping[str, Any],
        keep_best: bool = False,
    ) -> None:
        train = config.train
        self._accelerator, self._prepared, self._num_steps = accelerator, prepared, num_steps
        self._every, self._folder = train.checkpoint_every, Path(train.output_dir)
        in_thread = writes_in_thread(train, accelerator.device)
        self._writer = CheckpointWriter(self._folder / CHECKPOINTS, train.keep_checkpoints, in_thread)
        self._run = {
            "config": redacted(config.model_dump(mode="json")),
            "backbone": redacted(backbone_identity(config.model)),
            "data": plan.fingerprint(),
            "num_steps": num_steps,
            "num_processes": accelerator.num_processes,
            "notes": redacted(dict(notes)),
            "task": task_settings(unwrapped(prepared.model)),
        }
        self._best_writer: CheckpointWriter | None = None
        self._best: Mapping[str, Any] | None = None
        self._best_of: dict[int, int] = {}  # the step of a kept checkpoint -> the best step up to it
        prepared.hooks.bind(prepared.optimizer)
        if keep_best:
            self._best_writer = CheckpointWriter(self._folder / BEST, 1, in_thread)
            if prepared.resumed is not None:
                self._take_over(prepared.resumed)
        if self._every and prepared.resumed is None:
            self.save(0)
            self.finish()  # so that there is one before any step that could be lost

    def due(self, num_done: int, is_last: bool = False) -> bool:
        """Whether a checkpoint is to be written after ``num_done`` steps; ``is_last``: there will be no others."""
        return self._every > 0 and (num_done % self._every == 0 or num_done == self._num_steps or is_last)

    def save(self, num_done: int) -> None:
        """Write one after ``num_done`` steps, all of them logged. Collective."""
        if self._best_writer is not None:
            self._best_writer.wait()  # it is going to be named, and must be found by whoever continues
        self._write(self._writer, num_done)
        if self._best is not None:
            self._best_of[num_done] = self._best["step"]
            for step in sorted(self._best_of)[: -self._writer.keep]:
                del self._best_of[step]

    def save_best(self, num_done: int, record: Mapping[str, Any]) -> None:
        """Write the model after ``num_done`` steps, all of them logged, as the best one. Collective.

        Args:
            record: of it, for the checkpoints to come (:meth:`note_best`).
        """
        assert self._best_writer is not None
        self.note_best(record)
        self._best_writer.spared = set(self._best_of.values())
        self._write(self._best_writer, num_done)

    def note_best(self, record: Mapping[str, Any] | None) -> None:
        """What the checkpoints to come shall say of the best model."""
        self._best = record

    def _write(self, writer: CheckpointWriter, num_done: int) -> None:
        prepared = self._prepared
        run = {**self._run, "loss_scale": loss_scale(self._accelerator, prepared.optimizer), "best": self._best}
        logs = {}
        if self._accelerator.is_main_process:
            paths = {name: path for name in LOGS if (path := self._folder / name).exists()}
            logs = {name: read_bytes(path, MAX_RECORDS_BYTES) for name, path in paths.items()}
        writer.save(num_done, prepared.parameters, prepared.optimizer, prepared.hooks, run, logs)

    def _take_over(self, resumed: Checkpoint) -> None:
        """Find the best model of the run that goes on here, or bring it from the folder that it is in. Collective.

        Raises:
            UserError: it is not there any more.
        """
        self._best = resumed.run.get("best")
        if self._best is None:
            return
        here, theirs = self._folder / BEST, resumed.path.parent.parent / BEST
        name = folder_name(self._best["step"])

        def bring() -> None:
            if here.resolve() != theirs.resolve():
                copy_checkpoint(theirs / name, here / name)
            elif not (here / name).is_dir():
                raise UserError(
                    f"{here / name}, the best model up to {resumed.path}, is missing: bring it back from a copy, or "
                    "continue without keep_best and early_stopping"
                )

        agreed(lambda: bring() if this_rank() == 0 else None)
        for folder in checkpoints_in(resumed.path.parent):
            if (step := step_of(folder)) is not None and step <= resumed.step:
                self._best_of |= _best_in(folder, step)

    def best_checkpoint(self, step: int) -> Checkpoint:
        """The best model, which :meth:`save_best` has written after ``step`` steps. Collective.

        Raises:
            UserError: it is damaged.
        """
        self.finish()
        return checkpoint_at(self._folder / BEST / folder_name(step))

    def finish(self) -> None:
        """Until the last ones are on the disk."""
        self._writer.wait()
        if self._best_writer is not None:
            self._best_writer.wait()


def writes_in_thread(train: TrainConfig, device: torch.device) -> bool:
    """Whether checkpoints are written while training goes on; by default where it does not take the cores away."""
    return train.async_checkpoints == "on" or (train.async_checkpoints == "auto" and device.type != "cpu")


def _best_in(folder: Path, step: int) -> dict[int, int]:
    """Which step was the best one up to that of a checkpoint; {}: it does not say, or is damaged."""
    try:
        return {step: int(read_object(folder / STATE)["run"]["best"]["step"])}
    except (UserError, LookupError, TypeError, ValueError):
        return {}
