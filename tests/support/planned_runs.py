"""A few steps of a small LLaMA under an engine: the most that PyTorch's allocator had given out, what was sent."""

from __future__ import annotations

import gc
import os
import time
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from adalora_dist.methods.inject import adapt
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.tasks.commonsense.config import CommonsenseConfig
from adalora_dist.tasks.losses import LossSum, causal_loss
from adalora_dist.training.engine import build_accelerator
from adalora_dist.training.prepared import Prepared, prepare
from adalora_dist.training.start import engine_environment
from tests.support.paths import ROOT
from tests.support.recipe_runs import ENGINES
from tests.support.settings import adapter_section
from tests.support.wire import WireBytes

ROWS, LENGTH, STEPS = 8, 64, 6


def architecture(layers: int = 3) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=2048, max_position_embeddings=256,
    )  # fmt: skip


def configuration(**train: Any) -> CommonsenseConfig:
    """The pattern is frozen after four of six steps, and compacted."""
    adapter = adapter_section(
        init_rank=16,
        target_rank=4,
        initial_warmup_steps=1,
        final_steps=2,
        mask_interval_steps=1,
        targets=("all-linear",),
        budget_scope="local",  # ranks end up evenly, as a plan takes them to
    )
    settings = {"batch_size": ROWS, "micro_batch_size": ROWS, "max_steps": STEPS, "precision": "fp32", **train}
    return CommonsenseConfig.model_validate({"adapter": adapter, "train": settings, "data": {"max_length": LENGTH}})


def _accelerator(engine: str, config: CommonsenseConfig) -> Accelerator:
    zero1 = {**ENGINES["zero2"], "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "ds_configs" / "zero1.json")}
    os.environ.update({**ENGINES, "zero1": zero1, "hsdp": engine_environment("hsdp")}.get(engine, {}))
    return build_accelerator(config.train)


def _prepared(accelerator: Accelerator, config: CommonsenseConfig) -> tuple[Prepared, LossSum]:
    model = AutoModelForCausalLM.from_config(architecture(), dtype=torch.float32)
    adapt(model, config.adapter, 0)
    rows = [{"input_ids": [3] * LENGTH, "attention_mask": [1] * LENGTH, "labels": [3] * LENGTH}] * ROWS
    loss_sum = causal_loss(rows, 0, accelerator.device)  # type: ignore[arg-type]
    return prepare(accelerator, model, config, STEPS), loss_sum


def _step(
    accelerator: Accelerator, prepared: Prepared, loss_sum: LossSum, config: CommonsenseConfig, step: int
) -> None:
    plan = BatchPlan([LENGTH] * ROWS, [LENGTH] * ROWS, ROWS, 0)
    own = accelerator.process_index, accelerator.num_processes
    for indices in plan.micro_batches(step, *own, config.train.micro_batch_size):
        with accelerator.accumulate(prepared.model):
            accelerator.backward(loss_sum(prepared.model, indices))
            prepared.optimizer.step()
            prepared.optimizer.zero_grad()


def sent(rank: int, world_size: int, engine: str, config: CommonsenseConfig) -> int:
    """Bytes that a step puts into collectives, without AdaLoRA's; the second: in the first engines look around."""
    accelerator = _accelerator(engine, config)
    prepared, loss_sum = _prepared(accelerator, config)
    _step(accelerator, prepared, loss_sum, config, 0)
    with WireBytes(world_size // (2 if engine == "hsdp" else 1)) as wire:
        _step(accelerator, prepared, loss_sum, config, 1)
    partials = prepared.hooks.bound.partials
    prepared.hooks.detach()
    return wire.num_bytes - (4 * partials.numel() if prepared.hooks.engine.shard_group is not None else 0)


def counted(rank: int, world_size: int, engine: str, config: CommonsenseConfig) -> tuple[int, int, int, int]:
    """Most bytes alive in a step before the freeze, and in one after it; bytes that the method sums over processes in a
    step before the freeze, and in an allocation."""
    accelerator = _accelerator(engine, config)
    marks, summed = [], 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        prepared, loss_sum = _prepared(accelerator, config)
        for step in range(STEPS):
            gc.collect()  # of the model that engines have replaced, and of what a step leaves in circles
            marks.append(time.time_ns())
            _step(accelerator, prepared, loss_sum, config, step)
            if step == 0 and prepared.hooks.engine.shard_group is not None:
                summed = 4 * prepared.hooks.bound.partials.numel()
            prepared.hooks.catch_up(step + 1)
            prepared.hooks.replace(prepared.model, prepared.optimizer)
        marks.append(time.time_ns())
    prepared.hooks.detach()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held, before, after = 0, 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        if marks[1] <= event.start_ns() < marks[2]:
            before = max(before, held)
        if marks[STEPS - 1] <= event.start_ns():
            after = max(after, held)
    return before, after, summed, cast(Any, prepared.hooks.method_step).bytes_per_allocation
