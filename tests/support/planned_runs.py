"""A few steps of a small LLaMA under an engine, and the most that PyTorch's allocator had given out in them."""

from __future__ import annotations

import gc
import os
import time
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from adalora_dist.methods.inject import adapt
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.tasks.commonsense.config import CommonsenseConfig
from adalora_dist.tasks.losses import causal_loss
from adalora_dist.training.engine import build_accelerator
from adalora_dist.training.prepared import prepare
from tests.support.recipe_runs import ENGINES
from tests.support.settings import adapter_section

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


def counted(rank: int, world_size: int, engine: str, config: CommonsenseConfig) -> tuple[int, int, int, int]:
    """Most bytes alive in a step before the freeze, and in one after it; bytes that the method sums over processes in a
    step before the freeze, and in an allocation."""
    os.environ.update(ENGINES.get(engine, {}))
    accelerator = build_accelerator(config.train)
    marks, summed = [], 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = AutoModelForCausalLM.from_config(architecture(), dtype=torch.float32)
        adapt(model, config.adapter, 0)
        rows = [{"input_ids": [3] * LENGTH, "attention_mask": [1] * LENGTH, "labels": [3] * LENGTH}] * ROWS
        plan = BatchPlan([LENGTH] * ROWS, [LENGTH] * ROWS, ROWS, 0)
        prepared = prepare(accelerator, model, config, STEPS)
        loss_sum = causal_loss(rows, 0, accelerator.device)  # type: ignore[arg-type]
        for step in range(STEPS):
            gc.collect()  # of the model that engines have replaced, and of what a step leaves in circles
            marks.append(time.time_ns())
            for indices in plan.micro_batches(step, rank, world_size, config.train.micro_batch_size):
                with accelerator.accumulate(prepared.model):
                    loss = loss_sum(prepared.model, indices)
                    accelerator.backward(loss)
                    prepared.optimizer.step()
                    prepared.optimizer.zero_grad()
                    del loss
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
