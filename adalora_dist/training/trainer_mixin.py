"""What a ``Trainer`` does otherwise where its model has adapters: saving, resuming, choosing the best checkpoint.

A callback is told when these happen, and can change none of them. So the Trainer becomes one whose class puts
:class:`AdaLoraTrainerMixin` before its own. ``AdaLoraCallback`` sees to it: users add a callback, and nothing else.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer import SCHEDULER_NAME

from adalora_dist.artifacts.adapted_model import SaveAdapter, save_as_adapter
from adalora_dist.config.methods import LowRankConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods import METHODS
from adalora_dist.methods.protocol import carries_peft
from adalora_dist.sharding.agreement import agreed
from adalora_dist.sharding.tensors import release_gathered
from adalora_dist.training.trainer_deepspeed import check_deepspeed

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

_REPLACED = (
    *("_prepare_for_training", "_load_from_checkpoint", "_save_optimizer_and_scheduler", "_load_best_model"),
    *("_determine_best_metric", "_save", "save_model"),
)
"""Of Trainer's, without a stable name but the last."""


class Served(Protocol):
    """Of the callback, what the mixin asks for."""

    first_candidate: int

    @property
    def config(self) -> LowRankConfig: ...

    def convert(self, trainer: Any) -> None: ...

    def open(self, trainer: Any, folder: Path, num_steps: int) -> None: ...

    def save(self, trainer: Any, folder: Path) -> None: ...

    def load_best(self, trainer: Any, folder: Path) -> None: ...


class AdaLoraTrainerMixin(_Base):
    """Stands before a class of Trainers."""

    adalora: Served

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter, gathered over all processes; no engine gathers the backbone.

        Collective where an engine shards parameters, and in a checkpoint; else the main process may call it alone.
        """
        own: Any = super().save_model
        saver = saver_of(self)
        # A subclass's asks the model's save_pretrained; of a model without it only the state is saved, which nobody
        # takes for a whole model.
        if saver is None or own.__func__ is not Trainer.save_model:
            own(output_dir, _internal_call)
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        release_gathered(self.model_wrapped)
        is_alone = saver.is_whole() and not _internal_call
        state = saver.state(keep=self.args.should_save)

        def write() -> None:
            if saver.saves(unwrapped(self)):
                self._save(folder, state_dict=state)
            elif self.args.should_save:  # its own save asks the part that has the adapters
                with saver.holding(state):
                    self._save(folder, state_dict=state)

        write() if is_alone else agreed(write, keep=False)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        self.adalora.convert(self)
        check_deepspeed(self, self.adalora.config)
        if resume_from_checkpoint is not None:
            self.adalora.open(self, Path(resume_from_checkpoint), max_steps)
        parent: Any = super()
        return parent._prepare_for_training(max_steps, train_dataloader, None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: values are read once the engine has taken the model over."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.adalora.save(self, Path(output_dir))
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self.adalora.load_best(self, Path(self.state.best_model_checkpoint))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Before the pattern is frozen, a model has more triplets than the budget, and is no candidate."""
        if self.args.load_best_model_at_end and self.state.global_step < self.adalora.first_candidate:
            return False
        return super()._determine_best_metric(metrics, trial)


def take_over(trainer: Trainer, callback: Served) -> None:
    """Make ``trainer`` one with :class:`AdaLoraTrainerMixin`, and its model one that is saved as an adapter.

    Raises:
        UserError: transformers' Trainer is not built as this package knows it.
    """
    if missing := [name for name in _REPLACED if not hasattr(Trainer, name)]:
        raise UserError(f"transformers' Trainer has no {', '.join(missing)}: install transformers 5.17 to 5.23")
    own = type(trainer)
    if not isinstance(trainer, AdaLoraTrainerMixin):
        trainer.__class__ = type(own.__name__, (AdaLoraTrainerMixin, own), {"__module__": own.__module__})
    trainer.adalora = callback  # type: ignore[attr-defined]
    saver_of(trainer)


def saver_of(trainer: Any) -> SaveAdapter | None:
    """What saves the model of ``trainer`` as an adapter; None: it has none, has PEFT's, or is not transformers'."""
    model = unwrapped(trainer)
    return None if carries_peft(model) else save_as_adapter(model, METHODS[trainer.adalora.config.method])


def unwrapped(trainer: Any) -> Any:
    """The model of ``trainer`` as it was made with."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """The Trainer that is just calling ``callback``; None: somebody else is.

    Found among the callers: a callback is handed the Trainer's arguments, model and optimizer, but not the Trainer.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and any(known is callback for known in caller.callback_handler.callbacks):
            return caller
        frame = frame.f_back
    return None
