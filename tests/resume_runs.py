"""A run of 60 steps that meets everything, to be stopped anywhere and continued. Functions for ``run_ranks``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from distributed import import_deepspeed
from quantized_runs import environment, write_llama
from transformers import AutoModelForCausalLM

from adalora_dist.config import AdapterConfig, ModelConfig, RunConfig, TrainConfig
from adalora_dist.data.batches import BatchPlan
from adalora_dist.export import gather_adapters
from adalora_dist.inject import inject_adapters
from adalora_dist.sharding import select_engine
from adalora_dist.training.engine import build_accelerator, engine_name
from adalora_dist.training.loop import prepare, train
from adalora_dist.training.losses import causal_loss
from adalora_dist.training.model import load_backbone
from adalora_dist.training.resume import find_checkpoint
from adalora_dist.training.run_folder import RunFolder

deepspeed = import_deepspeed()

STEPS, WARMUP, FINAL, INTERVAL = 60, 10, 20, 3
BATCH, NUM_ROWS = 6, 22  # three batches to an epoch; some rows sit out
MICRO_STEPS = 2


class Stopped(Exception):
    """The run was ended here, between two micro-steps."""


@dataclass(frozen=True)
class Result:
    """What one rank saw; whole tensors on the CPU."""

    losses: list[float]
    metrics: str
    patterns: list[tuple[int, int, list[bool]]]
    adapters: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    """By kind and name, what this rank would write into a checkpoint, summed over ranks."""
    averages: list[dict[str, torch.Tensor]]
    first_step: int
    engine: str


def configuration(folder: Path, world_size: int = 1, **changes: Any) -> RunConfig:
    """The run in ``folder/run`` on ``folder/model``; any setting of adapter or train can be changed."""
    adapter: dict[str, Any] = dict(
        init_rank=3, target_rank=1.5, alpha=6, init="orthonormal", dropout=0.1, initial_warmup_steps=WARMUP,
        final_steps=FINAL, mask_interval_steps=INTERVAL, train_modules=("lm_head",),
    )  # fmt: skip
    training: dict[str, Any] = dict(
        output_dir=str(folder / "run"), max_steps=STEPS, batch_size=BATCH,
        micro_batch_size=BATCH // (MICRO_STEPS * world_size) or 1, learning_rate=2e-2, weight_decay=0.01,
        checkpoint_every=1, keep_checkpoints=2, log_every=7,
    )  # fmt: skip
    for name, value in changes.items():
        (adapter if name in AdapterConfig.model_fields else training)[name] = value
    return RunConfig(
        model=ModelConfig(name=str(folder / "model")), adapter=AdapterConfig(**adapter), train=TrainConfig(**training)
    )


def rows() -> list[dict[str, list[int]]]:
    sequences = [[3 + (k + 7 * i * (1 + k % 3)) % 30 for i in range(5 + k % 4)] for k in range(NUM_ROWS)]
    return [{"input_ids": ids, "labels": ids} for ids in sequences]


def write_model(folder: Path) -> None:
    write_llama(folder / "model", hidden_size=16, intermediate_size=24, vocab_size=40)


def run(
    rank: int, world_size: int, engine: str, config: RunConfig, stop: tuple[int, int] | None = None
) -> Result | None:
    """A run from wherever ``config.train.resume`` says; ends without a word at (step, micro-step) ``stop``."""
    if engine == "single":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"):
            os.environ.pop(name, None)
    os.environ.update(environment(engine))
    accelerator = build_accelerator(config.train)
    resumed = find_checkpoint(config)
    model, _ = load_backbone(config.model, AutoModelForCausalLM)
    data = rows()
    plan = BatchPlan.of_rows(data, BATCH, config.train.seed)
    inject_adapters(model, config.adapter, seed=1)
    prepared = prepare(accelerator, model, config, STEPS, resumed)
    folder = RunFolder(config, accelerator.is_main_process, {}, resumed)
    loss_of = causal_loss(data, 0, accelerator.device)
    first_step = 0 if resumed is None else resumed.step
    num_calls = 0

    def loss_sum(model: Any, indices: list[int]) -> torch.Tensor:
        nonlocal num_calls
        step, micro = divmod(num_calls, accelerator.gradient_accumulation_steps)
        num_calls += 1
        if stop is not None and (first_step + step, micro) >= stop:
            raise Stopped
        return loss_of(model, indices)

    try:
        losses = train(accelerator, prepared, plan, loss_sum, config, folder, lambda _: None)
    except Stopped:
        prepared.allocator.detach()
        return None
    allocator = prepared.allocator
    return Result(
        losses,
        (folder.path / "metrics.jsonl").read_text(),
        [(a.step, a.budget, a.keep.tolist()) for a in allocator.allocations],
        {a.name: a.delta() for a in gather_adapters(allocator)},
        whole_state(prepared),
        allocator.state().averages,
        first_step,
        engine_name(accelerator),
    )


def whole_state(prepared: Any) -> dict[str, torch.Tensor]:
    """Every trained parameter, put together over ranks."""
    engine = select_engine(list(prepared.parameters.values()), prepared.optimizer)
    return {name: engine.full(k).cpu() for k, name in enumerate(prepared.parameters)}
