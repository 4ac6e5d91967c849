"""What the trackers of a ``Trainer`` (``report_to``) get besides the numbers of its logs."""

from __future__ import annotations

from typing import Any

from transformers.integrations.integration_utils import TensorBoardCallback, WandbCallback

from adalora_dist.training.metrics import log_histogram


def show_ranks(trainer: Any, ranks: list[int]) -> None:
    """A histogram of the ranks of all matrices, in those of the trackers that have such. On the main process."""
    step = trainer.state.global_step
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and (writer := callback.tb_writer) is not None:
            log_histogram("tensorboard", writer, "train/ranks", ranks, step)
        elif isinstance(callback, WandbCallback) and getattr(callback._wandb, "run", None) is not None:
            log_histogram("wandb", callback._wandb, "train/ranks", ranks, step, axis="train/global_step")
