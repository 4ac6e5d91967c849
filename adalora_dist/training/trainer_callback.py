"""Adaptive ranks in transformers' ``Trainer``, and so in TRL's ``SFTTrainer``: one callback, on every engine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from adalora_dist.artifacts.adapted_model import adapted_part
from adalora_dist.artifacts.checkpoints.content import Checkpoint
from adalora_dist.artifacts.export import SavedAdapter, task_settings
from adalora_dist.artifacts.formats import FORMATS, Options
from adalora_dist.config.methods import LowRankConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.hooks import MethodHooks, attach
from adalora_dist.methods.protocol import carries_peft
from adalora_dist.methods.updates import gather_trained
from adalora_dist.sharding.agreement import agreed
from adalora_dist.sharding.base import innermost
from adalora_dist.sharding.optimizer_state import KNOWN, keeps_an_entry_per_weight
from adalora_dist.sharding.tensors import release_gathered
from adalora_dist.training.trainer_checkpoints import TrainerCheckpoints, base_of
from adalora_dist.training.trainer_logs import show_ranks
from adalora_dist.training.trainer_loss import multiplied_loss
from adalora_dist.training.trainer_mixin import calling_trainer, saver_of, take_over
from adalora_dist.training.trainer_peft import (
    WithoutAdapters,
    asks_peft_for_its_reference,
    convert_model,
    refuse_raw_parameters,
)

logger = logging.getLogger(__name__)


class AdaLoraCallback(TrainerCallback):
    """Allocates ranks while ``Trainer`` trains, on one process, DDP, FSDP2 or DeepSpeed ZeRO-1, -2 and -3.

    Three lines more than full fine-tuning::

        config = AdaLoraConfig(init_rank=12, target_rank=8)
        adapt(model, config)
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[AdaLoraCallback(config)])

    The schedule's length is the Trainer's own number of optimizer steps. Loss, data and arguments stay as they are:
    the orthogonality gradient is added inside the optimizer's step, so that neither gradient accumulation nor
    ``average_tokens_across_devices`` scales it.

    When pruning begins, one line is logged of how far the update has grown, a warning with the remedy where triplets
    have no signal yet: as in this project's own loop, and so are adapters without a part in the first step.

    Logs of training steps get ``budget`` (active triplets) and ``mean_rank`` (triplets per matrix), and so do
    ``trainer.state.log_history`` and the trackers that ``report_to`` names: the callback moves before theirs.
    TensorBoard and wandb get a histogram of the ranks besides.

    ``trainer.save_model()``, checkpoints and ``push_to_hub`` write the adapter, which PEFT loads, and no backbone.
    Checkpoints hold what ``resume_from_checkpoint`` needs to go on exactly, on another engine and number of processes,
    too. Pruned triplets leave memory once the pattern is frozen (``compact``). ``load_best_model_at_end`` chooses among
    the checkpoints from then on: earlier ones exceed the budget, and do not count for early stopping either.

    For all this the Trainer's class gets a mixin when it is made (``trainer_mixin.py``). Add the callback by
    ``callbacks=``, or call :meth:`attach_to` before anything else is done with a Trainer that there is.

    Ranks do not depend on accumulation and processes, unless the loss does: with T5 and many classifiers ``Trainer``
    multiplies it by both. That is refused; ``model.accepts_loss_kwargs = False``, set before, makes it right.

    A Trainer whose model has PEFT's LoRA or AdaLoRA (``SFTTrainer(peft_config=...)``) gets the converted one
    (:func:`~adalora_dist.artifacts.peft_model.convert_peft`); then ``config`` may be left out.

    Args:
        config: the ``adapter`` section that ``adapt`` was given.
        settings: for PEFT's adapters, without ``config``: of AdaLoraConfig, besides what PEFT's configuration says;
            for LoRA a budget, ``target_rank=4``.

    Raises:
        UserError: from ``train``, before the first step: no adapters in the model, a schedule that does not fit the
            number of steps, a checkpoint to resume that is damaged or of another run, an optimizer whose state cannot
            be kept, or what was said above to be refused.
        RuntimeError: from ``train``: the run ended (early stopping, too few rows) before the budget was reached, the
            optimizer that is stepped is not the Trainer's, or processes disagree on the pattern.
    """

    def __init__(self, config: LowRankConfig | None = None, **settings: Any) -> None:
        if config is not None and settings:
            raise UserError(f"AdaLoraCallback: config and {min(settings)}: give one of the two")
        self._config, self._settings, self._is_converted = config, settings, False
        self._hooks: MethodHooks | None = None
        self._trainer: Trainer | None = None
        self._checkpoints: TrainerCheckpoints | None = None
        self._resumed: Checkpoint | None = None
        self._rates: list[float] = []
        """The learning rate of each step until pruning begins, by which it is judged whether there is a signal."""
        self.first_candidate = 0
        """The number of steps from which on a checkpoint meets the budget; known once training has begun."""

    @property
    def config(self) -> LowRankConfig:
        """The ``adapter`` section.

        Raises:
            UserError: none was given, and no model with PEFT's adapters has said it.
        """
        if self._config is None:
            raise UserError(
                "AdaLoraCallback without a config takes it from PEFT's adapters, and the model has none: call "
                "adapt(model, config), and give AdaLoraCallback(config) the same"
            )
        return self._config

    @property
    def hooks(self) -> MethodHooks:
        """The method at work on this run's optimizer.

        Raises:
            RuntimeError: training has not begun.
        """
        if self._hooks is None:
            raise RuntimeError("the hooks exist once trainer.train() has begun")
        return self._hooks

    def attach_to(self, trainer: Trainer) -> None:
        """Serve a Trainer that was made without this callback, before it trains.

        Raises:
            UserError: its model has adapters of PEFT's that cannot be converted, or none and ``config`` was left out.
        """
        self.convert(trainer)
        self._serve(trainer)

    def _serve(self, trainer: Trainer) -> None:
        if not any(known is self for known in trainer.callback_handler.callbacks):
            trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        # First, so that trackers see what it adds to the logs. Trainer may be going through the list at this moment:
        # those after this one keep their places.
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))
        self._trainer = trainer
        take_over(trainer, self)

    def merge_and_save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the merged model, which plain transformers loads, with what is trained besides, and the tokenizer.

        Collective: call it on every process; the main one writes.

        Args:
            folder: must not exist.
            dtype: of the weights; None: as the base's files.

        Raises:
            UserError: on every process: the base is neither a folder nor in the Hub's cache, the folder exists, or it
                cannot be written.
            RuntimeError: training has not begun.
        """
        hooks, trainer = self.hooks, self._trainer
        assert trainer is not None
        release_gathered(trainer.model_wrapped)
        model = adapted_part(trainer.accelerator.unwrap_model(trainer.model_wrapped))
        updates = hooks.updates()
        trained = updates.trained if updates.model is model else gather_trained(model)

        def write() -> None:
            base, tokenizer = base_of(model), getattr(trainer, "processing_class", None)
            saved = SavedAdapter(updates, base.name, base.revision, trained, task_settings(model))
            own = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
            options = Options(dtype, names=getattr(model, "file_names", None), tokenizer=own)
            FORMATS["merged"].write(saved, Path(folder), options)

        agreed(lambda: write() if trainer.accelerator.is_main_process else None)

    # ------------------------------------------------------------------------------------ what Trainer's mixin calls

    def convert(self, trainer: Trainer) -> None:
        """Give ``trainer`` the converted model, once, if it has one with PEFT's adapters.

        Raises:
            UserError: as :meth:`attach_to`.
        """
        if trainer.model is not None and carries_peft(trainer.model) and not self._is_converted:
            self._config, self._is_converted = convert_model(trainer, self._config, self._settings), True

    def open(self, trainer: Trainer, folder: Path, num_steps: int) -> None:
        """Training is to continue from ``folder``, and no engine has taken the model over yet. Collective."""
        self._checkpoints = TrainerCheckpoints(self.config, num_steps)
        self._resumed = self._checkpoints.open(folder)
        self._checkpoints.shrink(trainer, self._resumed)

    def save(self, trainer: Trainer, folder: Path) -> None:
        """A checkpoint of Trainer's is being written. Collective."""
        self._of_this_run.save(trainer, self.hooks, folder, self._rates)

    def load_best(self, trainer: Trainer, folder: Path) -> None:
        """Training is over, and the model of an earlier checkpoint is the better one. Collective."""
        checkpoints = self._of_this_run
        checkpoints.restore(trainer, self.hooks, checkpoints.open(folder))

    @property
    def _of_this_run(self) -> TrainerCheckpoints:
        assert self._checkpoints is not None, "training has begun"
        return self._checkpoints

    # ------------------------------------------------------------------------------------------- events of Trainer's

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if (trainer := calling_trainer(self)) is None:
            return
        if not asks_peft_for_its_reference(trainer):
            self.convert(trainer)
        self._serve(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer is None and state.global_step == 0 and (caller := calling_trainer(self)) is not None:
            self.attach_to(caller)
        if (trainer := self._trainer) is None:
            raise UserError(
                "AdaLoraCallback does not know its Trainer: give it in Trainer(callbacks=[...]), or call "
                "callback.attach_to(trainer) before trainer.train()"
            )
        if self._hooks is not None:
            raise UserError(
                "train() was called again with an AdaLoraCallback that has served a run (auto_find_batch_size does so "
                "too): start from a new model, Trainer and AdaLoraCallback, with a batch size that fits"
            )
        if state.is_hyper_param_search:
            raise UserError(
                "hyperparameter_search trains several models with one AdaLoraCallback, which serves one run: make the "
                "model, Trainer and callback in the objective of your search, and call trainer.train() there"
            )
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if args.n_gpu > 1:
            raise UserError(
                f"{args.n_gpu} GPUs in one process: Trainer would copy the model to each (torch.nn.DataParallel), "
                "adapters and all; start one process per GPU, with accelerate launch or torchrun"
            )
        if carries_peft(model):
            raise UserError(
                "the model has PEFT's adapters (peft_config), put in by model_init or after the Trainer was made: "
                "call convert_peft on what has them there, and give AdaLoraCallback the config that it gives back"
            )
        refuse_raw_parameters(args)
        if self._is_converted:
            WithoutAdapters.give(trainer)
        num_processes = args.world_size if args.average_tokens_across_devices else 1
        settings = (args.gradient_accumulation_steps, num_processes, args.label_smoothing_factor)
        if problem := multiplied_loss(model, *settings):
            raise UserError(problem)
        take_over(trainer, self)  # the model may be a new one, of model_init
        if SaveStrategy(args.save_strategy) != SaveStrategy.NO and (saver := saver_of(trainer)) is not None:
            saver.check()
        # Kept even if the run is refused below: the optimizer has its hooks, so another train() must not add more.
        self._hooks = hooks = attach(model, optimizer, self.config, state.max_steps)
        try:
            self._check(args, state, optimizer)
            if self._checkpoints is None:
                self._checkpoints = TrainerCheckpoints(self.config, state.max_steps)
            if self._resumed is not None:
                self._resume(trainer, self._resumed, state)
        except UserError:
            hooks.detach()
            raise

    def _resume(self, trainer: Trainer, checkpoint: Checkpoint, state: TrainerState) -> None:
        if checkpoint.step != state.global_step:
            raise UserError(
                f"{checkpoint.path} is of step {checkpoint.step}, and trainer_state.json beside it of step "
                f"{state.global_step}: files of two checkpoints were mixed; give another"
            )
        self._of_this_run.restore(trainer, self.hooks, checkpoint)
        self._of_this_run.restore_schedule(trainer, checkpoint)
        self._rates = list(checkpoint.run.get("first_learning_rates", ()))

    def _check(self, args: TrainingArguments, state: TrainerState, optimizer: Any) -> None:
        """What cannot be kept to the end of the run, before its first step.

        Raises:
            UserError: with the setting and the remedy.
        """
        schedule = self.hooks.method_step.schedule
        saves = SaveStrategy(args.save_strategy) != SaveStrategy.NO and not args.save_only_model
        compacts = schedule is not None and getattr(self.config, "compact", False)
        inner = innermost(optimizer)
        if (saves or compacts) and not keeps_an_entry_per_weight(inner):
            away = [*["save_only_model=True"] * saves, *["compact=False in AdaLoraConfig"] * compacts]
            raise UserError(
                f"the optimizer is {type(inner).__name__} (optim={str(getattr(args.optim, 'value', args.optim))!r}), "
                f"whose state can be neither continued nor reduced: use {KNOWN} (optim='adamw_torch'), or "
                f"{' and '.join(away)}"
            )
        if schedule is None:
            return
        self.first_candidate = first = schedule.freeze_step + 1  # the first checkpoint whose pattern is final
        if not args.load_best_model_at_end:
            return
        if args.save_only_model:
            raise UserError(
                "load_best_model_at_end=True with save_only_model=True: a checkpoint without the state of the method "
                "cannot be loaded into a run; set save_only_model=False"
            )
        if IntervalStrategy(args.eval_strategy) == IntervalStrategy.STEPS:
            last = state.max_steps // int(state.eval_steps) * int(state.eval_steps)
            if last < max(first, args.eval_delay):
                raise UserError(
                    f"load_best_model_at_end=True with eval_steps={int(state.eval_steps)} and eval_delay="
                    f"{args.eval_delay:g}: no evaluation falls into steps {first} to {state.max_steps}, in which the "
                    "budget is met; lower eval_steps or eval_delay, or raise final_steps of AdaLoraConfig"
                )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        schedule = self.hooks.method_step.schedule
        last = 0 if schedule is None else schedule.initial_warmup_steps  # nothing is said of steps after it
        if state.global_step == len(self._rates) <= last:
            self._rates.append(float(innermost(kwargs["optimizer"]).param_groups[0]["lr"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.hooks.catch_up(state.global_step)
        assert self._trainer is not None
        if state.global_step == len(self._rates):
            for line in self.hooks.notices(state.global_step - 1, self._rates.__getitem__):
                if state.is_world_process_zero:
                    logger.warning("step %d/%d: %s", state.global_step, state.max_steps, line)
        self.hooks.replace(self._trainer.model_wrapped, self._trainer.optimizer)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:  # of an evaluation, or the summary of the run
            return
        numbers = self.hooks.method_step.report()
        logs.update(numbers)  # for the callbacks after this one
        state.log_history[-1].update(numbers)  # Trainer's record, a copy made before any callback
        if state.is_world_process_zero and self._trainer is not None:
            show_ranks(self._trainer, list(self.hooks.method_step.rank_pattern().values()))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hooks.finish()
