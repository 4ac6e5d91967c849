"""The training loop that all recipes share, on ``accelerate.Accelerator``. Reads top to bottom."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method

from adalora_dist.allocator import RankAllocator
from adalora_dist.checkpoint_content import Checkpoint, held_triplets, load_checkpoint, trained_parameters
from adalora_dist.compaction import compact, shrink_layers
from adalora_dist.config import RunConfig, TrainConfig
from adalora_dist.data.batches import BatchPlan
from adalora_dist.errors import UserError
from adalora_dist.inject import adapted_matrices, parameter_groups
from adalora_dist.progress import progress_bar
from adalora_dist.sharding.fsdp2 import reshard
from adalora_dist.training.engine import tied_weights_in_one_group
from adalora_dist.training.growth import growth_line
from adalora_dist.training.guard import Guard
from adalora_dist.training.losses import LossSum
from adalora_dist.training.nonfinite import BadSteps, find_origin
from adalora_dist.training.resume import METRICS, RunCheckpoints, compare_backbone, compare_data, set_loss_scale
from adalora_dist.training.run_folder import RunFolder
from adalora_dist.training.sharded_load import read_shards, read_trained_modules


@dataclass
class Prepared:
    """A model under its engine, with what trains it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer  # as the engine wraps it
    inner_optimizer: torch.optim.Optimizer  # the torch optimizer that updates the weights
    allocator: RankAllocator | None
    """None where there are no adapters: methods head and full."""
    parameters: dict[str, torch.Tensor]  # all that is trained, as the optimizer has it, by name
    resumed: Checkpoint | None = None  # where the run continues from


def total_steps(train: TrainConfig, plan: BatchPlan) -> int:
    """Optimizer steps of the run."""
    return train.max_steps or plan.num_steps(train.epochs)


def prepare(
    accelerator: Accelerator, model: nn.Module, config: RunConfig, num_steps: int, resumed: Checkpoint | None = None
) -> Prepared:
    """Optimizer over the trainable parameters, allocator attached, both handed to the engine; weights read last.

    Raises:
        UserError: ``resumed`` does not fit the model.
    """
    if resumed is not None:
        compare_backbone(resumed, config.model)
        matrices = adapted_matrices(model)
        shrink_layers(matrices, held_triplets(resumed, matrices))
    read_trained_modules(model)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.adapter, config.train.learning_rate),
        weight_decay=config.train.weight_decay,
        fused=config.train.precision != "fp16",  # its kernel would unscale gradients after the allocator has seen them
    )
    allocator = None
    if config.adapter.has_adapters:
        allocator = RankAllocator.attach(model, optimizer, config.adapter, num_steps)
    if config.train.gradient_checkpointing:
        cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with tied_weights_in_one_group(accelerator, model):
        model, wrapped = accelerator.prepare(model, optimizer)
    read_shards(model)
    prepared = Prepared(model, wrapped, optimizer, allocator, trained_parameters(model), resumed)
    if resumed is not None:
        load_checkpoint(resumed, prepared.parameters, wrapped, allocator)
        set_loss_scale(accelerator, wrapped, resumed.run["loss_scale"])
    return prepared


def learning_rate(train: TrainConfig, step: int, num_steps: int) -> float:
    """Linear warm-up from 0, then linear or cosine decay to 0, or constant. A pure function of the 0-based step."""
    num_warmup = train.lr_warmup_steps
    if num_warmup is None:
        num_warmup = math.ceil(train.lr_warmup_ratio * num_steps)
    if step < num_warmup:
        return train.learning_rate * (step + 1) / num_warmup
    done = (step - num_warmup) / max(1, num_steps - num_warmup)
    if train.lr_schedule == "linear":
        return train.learning_rate * (1 - done)
    if train.lr_schedule == "cosine":
        return train.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return train.learning_rate


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
) -> list[float]:
    """Run all steps that are left; returns the loss of each of the run (mean over the targets of the global batch).

    Args:
        notes: what checkpoints shall keep for the recipe.

    Raises:
        UserError: too many steps in a row with a loss or gradients that are not finite; the run that is continued had
            other training rows.
        RuntimeError: the allocator did not reach its budget, or its patterns differ between processes.
        SystemExit: a signal asked for an early end.
    """
    settings, model, optimizer = config.train, prepared.model, prepared.optimizer
    num_steps = total_steps(settings, plan)
    num_processes, num_micro = accelerator.num_processes, accelerator.gradient_accumulation_steps
    reshard(model)
    parameters = [p for group in prepared.inner_optimizer.param_groups for p in group["params"]]
    losses: list[float] = []
    if prepared.resumed is not None:
        compare_data(prepared.resumed, plan, config)
        losses = [json.loads(line)["loss"] for line in prepared.resumed.read(METRICS).splitlines()]
    checkpoints = RunCheckpoints(accelerator, prepared, plan, config, num_steps, notes or {})
    first_step = len(losses)
    unread: list[torch.Tensor] = []  # loss sums of this process, read together at every log line
    bad_steps = BadSteps(
        settings.max_nonfinite_steps, prepared.allocator.num_skipped_steps if prepared.allocator else 0
    )
    num_tokens, started = 0, time.monotonic()
    bar = progress_bar(total=num_steps, initial=first_step, desc="train", unit="step", show=accelerator.is_main_process)
    model.train()
    if guard is not None:
        guard.begin(prepared, first_step)
    for step in range(first_step, num_steps):
        _seed_step(settings.seed, step, accelerator.process_index)
        for group in prepared.inner_optimizer.param_groups:
            group["lr"] = group["lr_ratio"] * learning_rate(settings, step, num_steps)
        num_targets = plan.num_target_tokens(step)
        loss_of_step = torch.zeros((), device=accelerator.device)
        micro_batches = plan.micro_batches(step, accelerator.process_index, num_processes, settings.micro_batch_size)
        # With fewer rows than batch_size there are fewer; the engine was set up to count to num_micro.
        micro_batches += [[]] * (num_micro - len(micro_batches))
        for indices in micro_batches:
            with accelerator.accumulate(model):
                loss = loss_sum(model, indices)
                loss_of_step += loss.detach()
                # Engines average over processes and micro-steps; the loss is one mean over the global batch's targets.
                accelerator.backward(loss * (num_processes * num_micro / num_targets))
                if accelerator.sync_gradients and settings.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        if prepared.allocator is not None:
            prepared.allocator.catch_up(step + 1)
            if config.adapter.adapts_ranks and step == prepared.allocator.schedule.initial_warmup_steps:
                rates = [learning_rate(settings, t, num_steps) for t in range(step + 1)]
                prepared.allocator.bind(optimizer)  # if the engine has left out every step so far
                line = growth_line(prepared.allocator, [config.adapter.lora_plus_ratio * rate for rate in rates])
                report(f"step {step + 1}/{num_steps}: {line}")
            if config.adapter.compact and compact(prepared.allocator, model, optimizer):
                prepared.parameters = trained_parameters(model)
                parameters = [p for group in prepared.inner_optimizer.param_groups for p in group["params"]]
                report(f"step {step + 1}/{num_steps}: pattern frozen, pruned triplets removed from memory")
        unread.append(loss_of_step / num_targets)
        num_tokens += sum(plan.lengths[row] for row in plan.batch(step))
        bar.update()
        stops = guard is not None and guard.stops_after(step + 1)
        if (step + 1) % settings.log_every == 0 or step + 1 == num_steps or checkpoints.due(step + 1) or stops:
            read = accelerator.reduce(torch.stack(unread), reduction="sum").tolist()
            seconds = time.monotonic() - started
            for record in _records(prepared, config, len(losses), read, num_steps, num_tokens / seconds):
                folder.log(record)
                accelerator.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])
            if prepared.allocator is not None:
                folder.log_allocations(prepared.allocator)
            losses += read
            unread = []
            num_skipped = prepared.allocator.num_skipped_steps if prepared.allocator else 0
            if bad_steps.too_many(read, num_skipped):
                bar.close()
                raise UserError(
                    f"max_nonfinite_steps={settings.max_nonfinite_steps}: no finite loss and gradients in "
                    f"{bad_steps.in_a_row} steps in a row; {find_origin(accelerator, model, loss_sum, micro_batches)}"
                )
            summary = rank_summary(prepared.allocator)
            status = f"loss {read[-1]:.4f}, {summary}{num_tokens / seconds:.0f} tokens/s"
            bar.set_postfix_str(status)
            if not sys.stderr.isatty():
                left = bar.format_interval(seconds / (step + 1 - first_step) * (num_steps - step - 1))
                report(f"step {step + 1}/{num_steps}: {status}, {left} left")
        if stops or checkpoints.due(step + 1):
            checkpoints.save(step + 1)
        if stops and guard is not None:
            checkpoints.finish()
            guard.leave_preempted(step + 1)
    bar.close()
    if guard is not None:
        guard.end()
    checkpoints.finish()
    if prepared.allocator is not None:
        prepared.allocator.finish()
    return losses


def _seed_step(seed: int, step: int, process_index: int) -> None:
    """Dropout is a pure function of the step, so that a continued run draws what it would have drawn."""
    digest = hashlib.sha256(f"{seed} {step} {process_index}".encode()).digest()
    set_seed(int.from_bytes(digest[:4], "big"))


def rank_summary(allocator: RankAllocator | None) -> str:
    """'budget 288, ranks 0/4.0/12 (min/mean/max), ' for the progress line; nothing without adapters."""
    if allocator is None:
        return ""
    ranks = list(allocator.rank_pattern().values())
    mean = sum(ranks) / len(ranks)
    return f"budget {allocator.budget}, ranks {min(ranks)}/{mean:.1f}/{max(ranks)}, "


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a forward is collective, because processes hold only parts of the weights."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def generates_together(accelerator: Accelerator, model: nn.Module) -> bool:
    """Whether processes must take the same number of decoding steps; makes ``model.generate`` ready for FSDP2.

    FSDP2 gathers what lies outside the layers (embeddings) when the model's forward is called; ``generate`` of an
    encoder-decoder calls the encoder first, by itself.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        register_fsdp_forward_method(model, "generate")
    return is_sharded(accelerator) and accelerator.num_processes > 1


def _records(
    prepared: Prepared,
    config: RunConfig,
    first_step: int,
    losses: list[float],
    num_steps: int,
    tokens_per_second: float,
) -> Iterator[dict[str, Any]]:
    """One record of metrics per step since the last log line."""
    allocator = prepared.allocator
    for step, loss in enumerate(losses, first_step):
        record = {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate(config.train, step, num_steps),
            "tokens_per_second": round(tokens_per_second, 1),
        }
        if allocator is not None and config.adapter.adapts_ranks:
            made = [a for a in allocator.allocations if a.step <= step]
            record["budget"] = made[-1].budget if made else allocator.schedule.initial_budget
            record["allocated"] = int(bool(made) and made[-1].step == step)
        yield record
