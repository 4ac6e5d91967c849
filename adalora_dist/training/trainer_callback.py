"""Adaptive ranks in transformers' ``Trainer``, and so in TRL's ``SFTTrainer``: one callback, on every engine."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from adalora_dist.config.methods import LowRankConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.hooks import MethodHooks, attach
from adalora_dist.training.trainer_loss import multiplied_loss


class AdaLoraCallback(TrainerCallback):
    """Allocates ranks while ``Trainer`` trains, on one process, DDP, FSDP2 or DeepSpeed ZeRO-1, -2 and -3.

    Three lines more than full fine-tuning::

        config = MethodConfig(init_rank=12, target_rank=8)
        adapt(model, config)
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[AdaLoraCallback(config)])

    The schedule's length is the Trainer's own number of optimizer steps. Loss, data and arguments stay as they are:
    the orthogonality gradient is added inside the optimizer's step, so that neither gradient accumulation nor
    ``average_tokens_across_devices`` scales it.

    Logs of training steps get ``budget`` (active triplets) and ``mean_rank`` (triplets per matrix), as does
    ``trainer.state.log_history``. Trackers that ``report_to`` names run before callbacks of the user's and so miss
    both: give ``report_to="none"`` and put the tracker's own callback behind this one in ``callbacks``.

    Pruned triplets stay in memory, at 0, until the end of the run: ``compact`` of the configuration is for the recipes'
    loop, because a callback does not see the wrapped model whose buffers would have to be rebuilt.

    To keep the adapter, call on every process, after ``train``::

        adapters = callback.hooks.updates()
        if trainer.is_world_process_zero():
            save_adapter(adapters, Path("adapter"), "meta-llama/Llama-3.1-8B", None)

    Checkpoints of ``save_strategy`` hold backbone and adapters of that moment, for evaluation. Two things need the
    allocator's own state, which they lack, and are refused: ``resume_from_checkpoint``, and ``load_best_model_at_end``
    when it could choose a checkpoint from before the pattern was frozen, which has more triplets than the budget.

    Ranks do not depend on accumulation and processes, unless the loss does: with T5 and many classifiers ``Trainer``
    multiplies it by both. That is refused, too; ``model.accepts_loss_kwargs = False``, set before, makes it right.

    Args:
        config: the ``adapter`` section that ``adapt`` was given.

    Raises:
        UserError: from ``train``, before the first step: no adapters in the model, a schedule that does not fit the
            number of steps, or one of the refusals above.
        RuntimeError: from ``train``: the run ended (early stopping, too few rows) before the budget was reached, the
            optimizer that is stepped is not the Trainer's, or processes disagree on the pattern.
    """

    def __init__(self, config: LowRankConfig) -> None:
        self.config = config
        self._hooks: MethodHooks | None = None

    @property
    def hooks(self) -> MethodHooks:
        """The method at work on this run's optimizer.

        Raises:
            RuntimeError: training has not begun.
        """
        if self._hooks is None:
            raise RuntimeError("the hooks exist once trainer.train() has begun")
        return self._hooks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            raise UserError(
                f"resume_from_checkpoint (step {state.global_step}): a Trainer checkpoint lacks the allocator's "
                "importance averages and pattern, and resuming them is not supported yet: train from step 0"
            )
        if self._hooks is not None:
            raise UserError(
                "train() was called again with an AdaLoraCallback that has served a run (auto_find_batch_size does so "
                "too): start from a new model, Trainer and AdaLoraCallback, with a batch size that fits"
            )
        if args.n_gpu > 1:
            raise UserError(
                f"{args.n_gpu} GPUs in one process: Trainer would copy the model to each (torch.nn.DataParallel), "
                "adapters and all; start one process per GPU, with accelerate launch or torchrun"
            )
        num_processes = args.world_size if args.average_tokens_across_devices else 1
        settings = (args.gradient_accumulation_steps, num_processes, args.label_smoothing_factor)
        if problem := multiplied_loss(kwargs["model"], *settings):
            raise UserError(problem)
        # Kept even if the run is refused below: the optimizer has its hooks, so another train() must not add more.
        self._hooks = hooks = attach(kwargs["model"], kwargs["optimizer"], self.config, state.max_steps)
        if (schedule := hooks.method_step.schedule) is None:
            return
        first_step = schedule.freeze_step + 1  # the first checkpoint whose pattern is final
        strategy = IntervalStrategy(args.eval_strategy)
        delayed = strategy == IntervalStrategy.STEPS and args.eval_delay >= first_step
        if args.load_best_model_at_end and not delayed:
            hooks.detach()
            raise UserError(
                f"load_best_model_at_end=True with eval_strategy={strategy.value!r} and eval_delay="
                f"{args.eval_delay:g}: a checkpoint from before step {first_step} exceeds the budget; set "
                f"eval_strategy='steps' and eval_delay={first_step}, or load_best_model_at_end=False"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.hooks.catch_up(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs:  # of an evaluation, or the summary of the run
            return
        numbers = self.hooks.method_step.report()
        logs.update(numbers)  # for the callbacks after this one
        state.log_history[-1].update(numbers)  # Trainer's record, a copy made before any callback

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hooks.finish()
