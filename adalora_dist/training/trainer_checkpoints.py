"""What a checkpoint of transformers' ``Trainer`` holds of a run with adapters, besides Trainer's own counters.

``checkpoint-N/`` has the adapter itself, as PEFT loads it, and in ``adalora/`` one checkpoint of the project's
(:mod:`adalora_dist.artifacts.checkpoints`): values, moments and all that the method has learnt, sharded as the run is,
verified before it is read. It takes the place of Trainer's model and optimizer files on every engine, which hold the
backbone, too, and know nothing of the method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import SCHEDULER_NAME

from adalora_dist.artifacts.adapted_model import adapted_part
from adalora_dist.artifacts.checkpoints.content import Checkpoint, held_parts, load_checkpoint
from adalora_dist.artifacts.checkpoints.files import checkpoints_in
from adalora_dist.artifacts.checkpoints.writer import CheckpointWriter, checkpoint_at
from adalora_dist.artifacts.export import task_settings
from adalora_dist.config.methods import MethodConfig
from adalora_dist.config.sections import ModelConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods import method_for
from adalora_dist.methods.hooks import MethodHooks
from adalora_dist.methods.protocol import adapters_of, trained_parameters
from adalora_dist.sharding.agreement import agreed, this_rank
from adalora_dist.sharding.base import innermost
from adalora_dist.sharding.tensors import release_gathered
from adalora_dist.training.resume import backbone_identity, compare_backbone, loss_scale, set_loss_scale

FOLDER = "adalora"
"""Inside of a checkpoint of Trainer's."""
_FREE = ("importance_kernel", "compact")
"""Settings that may change from one part of a run to the next."""


class TrainerCheckpoints:
    """Writes and reads ``adalora/`` of one run's checkpoints.

    Args:
        config: the ``adapter`` section.
        num_steps: optimizer steps of the whole run.
    """

    def __init__(self, config: MethodConfig, num_steps: int) -> None:
        self._config, self._num_steps = config, num_steps
        self._writer: CheckpointWriter | None = None

    def save(self, trainer: Any, hooks: MethodHooks, folder: Path, first_rates: Sequence[float]) -> None:
        """Write ``folder/adalora`` between two steps. Collective.

        Args:
            first_rates: the learning rates of the steps until pruning began, for the run that continues.

        Raises:
            UserError, RuntimeError: on every process, if one cannot write.
        """
        release_gathered(trainer.model_wrapped)
        hooks.bind(trainer.optimizer)
        if self._writer is None:  # it makes a process group
            self._writer = CheckpointWriter(folder / FOLDER, keep=1)
        self._writer.root = folder / FOLDER
        run = {
            "config": {"adapter": self._config.model_dump(mode="json")},
            "num_steps": self._num_steps,
            "backbone": backbone_identity(base_of(adapted_part(trainer.model))),
            "task": task_settings(adapted_part(trainer.model)),
            "learning_rates": [float(group["lr"]) for group in innermost(trainer.optimizer).param_groups],
            "first_learning_rates": list(first_rates),
            "loss_scale": loss_scale(trainer.accelerator, trainer.optimizer),
        }
        step = trainer.state.global_step
        self._writer.save(step, trained_parameters(trainer.model), trainer.optimizer, hooks, run)

    def open(self, folder: Path) -> Checkpoint:
        """The verified state in a checkpoint of Trainer's. Collective.

        Raises:
            UserError: there is none, it is damaged, or it is of a run with other settings or another length.
        """

        def find() -> str | None:
            found = checkpoints_in(folder / FOLDER)
            return str(found[0]) if found else None

        found = agreed(find if this_rank() == 0 else lambda: None)[0]
        if found is None:
            raise UserError(
                f"{folder} has no {FOLDER}/ with the adapters' state: it is not of a run with AdaLoraCallback, was not "
                "written to the end, or save_only_model=True left it out; give an earlier checkpoint, or train anew"
            )
        checkpoint = checkpoint_at(Path(found))
        if changes := list(self._changes(checkpoint)):
            raise UserError(
                f"{folder} is of a run with other settings ({', '.join(changes)}): set them back, or train anew in "
                "another output_dir"
            )
        return checkpoint

    def _changes(self, checkpoint: Checkpoint) -> Iterator[str]:
        then: Mapping[str, Any] = checkpoint.run["config"]["adapter"]
        now = self._config.model_dump(mode="json")
        for name in sorted(then.keys() | now.keys()):
            if name not in _FREE and then.get(name) != now.get(name):
                yield f"{name} {then.get(name)} -> {now.get(name)}"
        if checkpoint.run["num_steps"] != self._num_steps:
            yield f"optimizer steps {checkpoint.run['num_steps']} -> {self._num_steps}, by which the budget falls"

    def shrink(self, trainer: Any, checkpoint: Checkpoint) -> None:
        """Before an engine takes the model over: reduce adapters to the triplets that the checkpoint has.

        Raises:
            UserError: the checkpoint is of another model, or an optimizer has taken the whole adapters over already.
        """
        compare_backbone(checkpoint, base_of(adapted_part(trainer.model)))
        adapters = adapters_of(trainer.model)
        held = held_parts(checkpoint, adapters)
        if all(held[adapter.name] == adapter.held() for adapter in adapters):
            return
        if trainer.optimizer is not None:
            raise UserError(
                f"{checkpoint.path} has fewer triplets than the model, and optimizers=(...) was made for all: leave "
                "optimizers out of the Trainer, or train with compact=False"
            )
        method_for(self._config).shrink(adapters, held)

    def restore(self, trainer: Any, hooks: MethodHooks, checkpoint: Checkpoint) -> None:
        """Put values, moments and the method's state into the prepared run. Collective.

        Raises:
            UserError: something is missing, or of another shape.
        """
        release_gathered(trainer.model_wrapped)
        load_checkpoint(checkpoint, trained_parameters(trainer.model), trainer.optimizer, hooks)

    def restore_schedule(self, trainer: Any, checkpoint: Checkpoint) -> None:
        """Learning rates, their scheduler and the scale of fp16 gradients, as they were.

        Raises:
            UserError: the optimizer has other groups, or the scheduler's file is missing.
        """
        groups, rates = innermost(trainer.optimizer).param_groups, checkpoint.run["learning_rates"]
        if len(groups) != len(rates):
            raise UserError(
                f"{checkpoint.path} is of an optimizer with {len(rates)} groups of parameters, this one has "
                f"{len(groups)}: make the optimizer as it was"
            )
        file = checkpoint.path.parent.parent / SCHEDULER_NAME
        if not file.is_file():
            raise UserError(f"{file} is missing: give an earlier checkpoint")
        trainer.lr_scheduler.load_state_dict(torch.load(file, weights_only=True))
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        set_loss_scale(trainer.accelerator, trainer.optimizer, checkpoint.run["loss_scale"])


def base_of(model: Any) -> ModelConfig:
    """The backbone's folder or name and its commit, as far as the model remembers."""
    name = getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "")
    return ModelConfig(name=name, revision=getattr(model.config, "_commit_hash", None))
