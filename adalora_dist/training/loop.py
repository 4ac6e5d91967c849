"""The training loop that all recipes share, on ``accelerate.Accelerator``. Reads top to bottom."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adalora_dist.backbones.merging import check_mergeable
from adalora_dist.config.engines import BACKBONE_SHARDING
from adalora_dist.config.generation import DecodingConfig
from adalora_dist.config.sections import EvaluationConfig, RunConfig
from adalora_dist.io.errors import UserError
from adalora_dist.io.progress import duration, progress_bar
from adalora_dist.methods.protocol import trained_parameters
from adalora_dist.sharding.tensors import gather_for, put_back_shards, with_every_gradient
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.tasks.losses import LossSum
from adalora_dist.training.engine import begin_accumulation, engine_name
from adalora_dist.training.evaluations import Evaluate, Evaluations
from adalora_dist.training.faults.guard import Guard
from adalora_dist.training.faults.nonfinite import BadSteps, find_origin
from adalora_dist.training.metrics import StepMetrics, log_ranks
from adalora_dist.training.prepared import Prepared, learning_rate, total_steps
from adalora_dist.training.resume import METRICS, compare_data
from adalora_dist.training.run_checkpoints import RunCheckpoints
from adalora_dist.training.run_folder import RunFolder


def train(
    accelerator: Accelerator,
    prepared: Prepared,
    plan: BatchPlan,
    loss_sum: LossSum,
    config: RunConfig,
    folder: RunFolder,
    report: Callable[[str], None],
    guard: Guard | None = None,
    notes: Mapping[str, Any] | None = None,
    evaluate: Evaluate | None = None,
) -> list[float]:
    """Run all steps that are left; returns the loss of each of the run (mean over the targets of the global batch).

    Afterwards the model is that of the last step, or the best one, if ``keep_best`` asks for it.

    Args:
        notes: what checkpoints shall keep for the recipe.
        evaluate: scores of the model as it is, called on all processes together every ``eval_every`` steps; they are
            logged with the step's loss, as ``eval_NAME``.

    Raises:
        UserError: too many steps in a row with a loss or gradients that are not finite; the run that is continued had
            other training rows; as :class:`~adalora_dist.training.evaluations.Evaluations`.
        RuntimeError: the method did not reach its budget, or its patterns differ between processes.
        SystemExit: a signal asked for an early end.
    """
    settings, model, optimizer, hooks = config.train, prepared.model, prepared.optimizer, prepared.hooks
    num_steps = total_steps(settings, plan)
    is_ddp = isinstance(model, DistributedDataParallel)  # also of one process, as torchrun starts it
    num_processes, limits = accelerator.num_processes, (settings.micro_batch_size, settings.micro_batch_tokens)
    put_back_shards(model)
    parameters = _clipped(model, prepared.inner_optimizer)
    past: list[bytes] = []
    if prepared.resumed is not None:
        compare_data(prepared.resumed, plan, config)
        past = prepared.resumed.read(METRICS).splitlines()
    evaluations = Evaluations(prepared, config.evaluation, num_steps, evaluate)
    keep_best = bool(config.evaluation.keep_best)
    checkpoints = RunCheckpoints(accelerator, prepared, plan, config, num_steps, notes or {}, keep_best)
    evaluations.check_name()
    metrics = StepMetrics(accelerator, prepared, settings, plan, num_steps, past)
    first_step = len(metrics.losses)
    bad_steps = BadSteps(settings.max_nonfinite_steps, hooks.num_skipped_steps)
    bar = progress_bar(total=num_steps, initial=first_step, desc="train", unit="step", show=accelerator.is_main_process)
    model.train()
    if guard is not None:
        guard.begin(prepared, first_step)
    for step in range(first_step, num_steps):
        if evaluations.ended:  # before the run was interrupted
            break
        _seed_step(settings.seed, step, accelerator.process_index)
        for group in prepared.inner_optimizer.param_groups:
            group["lr"] = group["lr_ratio"] * learning_rate(settings, step, num_steps)
        num_targets = plan.num_target_tokens(step)
        loss_of_step, norm = torch.zeros((), device=accelerator.device), None
        micro_batches = plan.micro_batches(step, accelerator.process_index, num_processes, *limits)
        divisor = begin_accumulation(accelerator, len(micro_batches))
        for indices in micro_batches:
            with accelerator.accumulate(model):
                loss = loss_sum(model, indices)
                if not loss.requires_grad:
                    raise UserError(
                        f"the loss of {type(model).__name__} depends on nothing that is trained: name other targets, "
                        "or add modules to train_modules"
                    )
                if is_ddp:
                    loss = with_every_gradient(loss, list(prepared.parameters.values()))
                loss_of_step += loss.detach()
                # Engines average over processes and micro-steps; the loss is one mean over the global batch's targets.
                accelerator.backward(loss * (num_processes * divisor / num_targets))
                if accelerator.sync_gradients and settings.max_grad_norm > 0:
                    norm = accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
                optimizer.step()  # here the method acts, in hooks of the innermost optimizer (methods/hooks.py)
                optimizer.zero_grad()
        hooks.catch_up(step + 1)
        for line in hooks.notices(step, lambda t: learning_rate(settings, t, num_steps)):
            report(f"step {step + 1}/{num_steps}: {line}")
        if done := hooks.replace(model, optimizer):
            prepared.parameters = trained_parameters(model)
            parameters = _clipped(model, prepared.inner_optimizer)
            report(f"step {step + 1}/{num_steps}: {done}")
        metrics.add(step, loss_of_step / num_targets, norm)
        bar.update()
        stops = guard is not None and guard.stops_after(step + 1)
        with metrics.paused():
            scores = evaluations.after(step + 1)
        if (
            scores
            or (step + 1) % settings.log_every == 0
            or step + 1 == num_steps
            or checkpoints.due(step + 1)
            or stops
        ):
            records = metrics.read()
            records[-1] |= scores
            for record in records:
                folder.log(record)
                accelerator.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
            folder.log_events(hooks.method_step)
            log_ranks(accelerator, hooks.method_step, step)
            read = [record["loss"] for record in records]
            if bad_steps.too_many(read, hooks.num_skipped_steps):
                bar.close()
                raise UserError(
                    f"max_nonfinite_steps={settings.max_nonfinite_steps}: no finite loss and gradients in "
                    f"{bad_steps.in_a_row} steps in a row; {find_origin(accelerator, model, loss_sum, micro_batches)}"
                )
            found = "".join(f"{name} {score:.4f}, " for name, score in scores.items())
            speed = f"{metrics.tokens_per_second:,.0f} tokens/s"
            status = f"loss {read[-1]:.4f}, {found}{hooks.method_step.progress()}{speed}"
            bar.set_postfix_str(status)
            if not sys.stderr.isatty():
                report(f"step {step + 1}/{num_steps}: {status}, {duration(metrics.seconds_left)} left")
        if evaluations.improved(step + 1, scores):
            checkpoints.save_best(step + 1, evaluations.record or {})
        checkpoints.note_best(evaluations.record)
        if stops or checkpoints.due(step + 1, evaluations.ended):
            checkpoints.save(step + 1)
        if stops and guard is not None:
            checkpoints.finish()
            guard.leave_preempted(step + 1)
        if evaluations.ended:
            break
    bar.close()
    if guard is not None:
        guard.end()
    checkpoints.finish()
    hooks.finish()
    losses = metrics.losses
    if first_step < len(losses):
        report(metrics.summary())
    if said := evaluations.sentence(len(losses)):
        report(said)
    if (best := evaluations.best) is not None:
        if best.step < len(losses):
            evaluations.restore(checkpoints.best_checkpoint(best.step))
        folder.write_json("best.json", {**best.model_dump(), "num_steps": len(losses)})
    return losses


def _clipped(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What the optimizer updates, in the order of the model: accelerate compares it with the model's, one by one."""
    updated = [p for group in optimizer.param_groups for p in group["params"]]
    known = {id(p) for p in updated}
    return [p for p in model.parameters() if id(p) in known] or updated  # ZeRO's masters are none of the model's


def _seed_step(seed: int, step: int, process_index: int) -> None:
    """Dropout is a pure function of the step, so that a continued run draws what it would have drawn."""
    digest = hashlib.sha256(f"{seed} {step} {process_index}".encode()).digest()
    set_seed(int.from_bytes(digest[:4], "big"))


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a forward is collective, because processes hold only parts of the weights."""
    return engine_name(accelerator) in BACKBONE_SHARDING


def generates_together(accelerator: Accelerator, model: nn.Module, evaluation: EvaluationConfig) -> bool:
    """Whether processes must take the same number of decoding steps; makes ``model.generate`` ready for FSDP2.

    FSDP2 gathers what lies outside the layers (embeddings) when the model's forward is called; ``generate`` of an
    encoder-decoder calls the encoder first, by itself.

    Raises:
        UserError: ``merge_to_generate`` is set, and there is nothing to merge.
    """
    if isinstance(evaluation, DecodingConfig) and evaluation.merge_to_generate:
        check_mergeable(model)
    gather_for(model, "generate")
    return is_sharded(accelerator) and accelerator.num_processes > 1
