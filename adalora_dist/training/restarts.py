"""A limit on starts that nobody has asked for: a run that fails at the same place each time ends, and says so."""

from __future__ import annotations

import json
from pathlib import Path

from adalora_dist.config.sections import TrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import read_object
from adalora_dist.io.launchers import is_restarted
from adalora_dist.io.publish import write_whole, writing
from adalora_dist.sharding.agreement import agreed, this_rank

RECORD = ".restarts"
"""In the run's folder: the step that the last restart went on from, and how many have done so."""


def count_restart(train: TrainConfig, step: int) -> None:
    """Of a program that a launcher or a scheduler has started again, which goes on after ``step`` steps. Collective.

    A start by hand begins a new count, as does a checkpoint that was written in between.

    Raises:
        UserError: more than ``max_restarts_at_step`` of them in a row went on from there.
    """
    agreed(lambda: _count(train, step) if this_rank() == 0 else None)


def _count(train: TrainConfig, step: int) -> None:
    path = Path(train.output_dir) / RECORD
    with writing(path):
        if not is_restarted():
            path.unlink(missing_ok=True)
            return
        count = 1 + _earlier(path, step)
        if count > train.max_restarts_at_step:
            raise UserError(
                f"max_restarts_at_step={train.max_restarts_at_step}: the run has been started again {count - 1} "
                f"time(s) after step {step} and has not got to its next checkpoint: look at its log for the cause, "
                "then start it by hand"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"step": step, "count": count}) + "\n")


def _earlier(path: Path, step: int) -> int:
    """How many restarts before this one went on from there."""
    try:
        record = read_object(path)
    except UserError:
        return 0
    count = record.get("count")
    return count if record.get("step") == step and isinstance(count, int) else 0
