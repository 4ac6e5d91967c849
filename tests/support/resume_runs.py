"""A run of 60 steps that meets everything, to be stopped anywhere and continued. Functions for ``run_ranks``."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from adalora_dist.artifacts.checkpoints.content import Checkpoint
from adalora_dist.artifacts.checkpoints.writer import CheckpointWriter, checkpoint_at, newest_checkpoint
from adalora_dist.backbones.load import load_backbone
from adalora_dist.config.methods import AdaLoraConfig
from adalora_dist.config.sections import ModelConfig, RunConfig, TrainConfig
from adalora_dist.methods.inject import adapt
from adalora_dist.sharding import select_engine
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.tasks.losses import causal_loss
from adalora_dist.training.engine import build_accelerator, engine_name
from adalora_dist.training.loop import train
from adalora_dist.training.prepared import prepare
from adalora_dist.training.resume import find_checkpoint
from adalora_dist.training.run_folder import RunFolder
from tests.support.quantized_runs import environment, write_llama
from tests.support.ranks import import_deepspeed, run_ranks
from tests.support.settings import adapter_section
from tests.support.tiny_language_model import word_tokenizer

deepspeed = import_deepspeed()

STEPS, WARMUP, FINAL, INTERVAL = 60, 10, 20, 3
BATCH, NUM_ROWS = 6, 22  # three batches to an epoch; some rows sit out
MICRO_STEPS = 2
NUM_TRIPLETS = 42  # of 14 matrices; half of them stay
WORLD_SIZES = {"single": 1, "ddp": 2, "fsdp2": 2, "zero2": 2, "zero3": 2}
PAIRS = [
    *(("single", 1, "ddp", 2), ("ddp", 2, "single", 1), ("ddp", 2, "ddp", 3)),
    *(("fsdp2", 2, "fsdp2", 3), ("zero3", 2, "zero3", 3), ("zero3", 2, "single", 1), ("single", 1, "fsdp2", 2)),
    *((a, 2, b, 2) for a in ("ddp", "fsdp2", "zero3") for b in ("ddp", "fsdp2", "zero3") if a != b),
    *(("zero2", 2, "zero3", 3), ("fsdp2", 2, "zero2", 2)),
]  # fmt: skip


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
    """Every trained parameter, put together over ranks."""
    averages: list[dict[str, torch.Tensor]]
    first_step: int
    engine: str


def configuration(folder: Path, world_size: int = 1, **changes: Any) -> RunConfig:
    """The run in ``folder/run`` on ``folder/model``; any setting of adapter or train can be changed."""
    adapter: dict[str, Any] = dict(
        init_rank=3, target_rank=1.5, alpha=6, start="paper", init="orthonormal", dropout=0.1,
        initial_warmup_steps=WARMUP, final_steps=FINAL, mask_interval_steps=INTERVAL, train_modules=("lm_head",),
    )  # fmt: skip
    training: dict[str, Any] = dict(
        output_dir=str(folder / "run"), max_steps=STEPS, batch_size=BATCH,
        micro_batch_size=BATCH // (MICRO_STEPS * world_size) or 1, learning_rate=2e-2, weight_decay=0.01,
        checkpoint_every=1, keep_checkpoints=2, log_every=7,
    )  # fmt: skip
    for name, value in changes.items():
        (adapter if name in AdaLoraConfig.model_fields else training)[name] = value
    return RunConfig(
        model=ModelConfig(name=str(folder / "model")), adapter=adapter_section(**adapter), train=TrainConfig(**training)
    )


def rows() -> list[dict[str, list[int]]]:
    sequences = [[3 + (k + 7 * i * (1 + k % 3)) % 30 for i in range(5 + k % 4)] for k in range(NUM_ROWS)]
    return [{"input_ids": ids, "labels": ids} for ids in sequences]


def write_model(folder: Path) -> None:
    write_llama(folder / "model", hidden_size=16, intermediate_size=24, vocab_size=40)
    word_tokenizer(["no more than forty words"]).save_pretrained(folder / "model")


def run(
    rank: int,
    world_size: int,
    engine: str,
    config: RunConfig,
    stop: tuple[int, int] | None = None,
    resaved: Path | None = None,
) -> Result | None:
    """A run from wherever ``config.train.resume`` says; ends without a word at (step, micro-step) ``stop``.

    ``resaved``: where a checkpoint is written of what was loaded.
    """
    if engine == "single":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"):
            os.environ.pop(name, None)
    os.environ.update(environment(engine))
    accelerator = build_accelerator(config.train)
    resumed = find_checkpoint(config)
    model, _ = load_backbone(config.model, AutoModelForCausalLM)
    data = rows()
    plan = BatchPlan.of_rows(data, BATCH, config.train.seed)
    adapt(model, config.adapter, seed=1)
    prepared = prepare(accelerator, model, config, STEPS, resumed)
    if resaved is not None:
        hooks = prepared.hooks
        CheckpointWriter(resaved, 1).save(hooks.step, prepared.parameters, prepared.optimizer, hooks, {})
    folder = RunFolder(config, accelerator.is_main_process, {}, resumed)
    loss_of = causal_loss(data, 0, accelerator.device)
    first_step = 0 if resumed is None else resumed.step
    step = first_step - 1

    def loss_sum(model: Any, indices: list[int]) -> torch.Tensor:
        nonlocal step
        micro = accelerator.step - 1  # steps may have different numbers of them
        step += micro == 0
        if stop is not None and (step, micro) >= stop:
            raise Stopped
        return loss_of(model, indices)

    try:
        losses = train(accelerator, prepared, plan, loss_sum, config, folder, lambda _: None)
    except Stopped:
        prepared.hooks.detach()
        return None
    allocations = getattr(prepared.hooks.method_step, "allocations", [])  # AdaLoRA's alone
    return Result(
        losses,
        (folder.path / "metrics.jsonl").read_text(),
        [(a.step, a.budget, a.keep.tolist()) for a in allocations],
        {a.name: a.delta() for a in prepared.hooks.updates()},
        whole_state(prepared),
        prepared.hooks.state().averages,
        first_step,
        engine_name(accelerator),
    )


def whole_state(prepared: Any) -> dict[str, torch.Tensor]:
    """Every trained parameter, put together over ranks."""
    engine = select_engine(list(prepared.parameters.values()), prepared.optimizer)
    return {name: engine.full(k).cpu() for k, name in enumerate(prepared.parameters)}


def whole_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, by kind and name, put together from its shards."""
    shapes = {name: described["shape"] for name, described in checkpoint.state["parameters"].items()}
    whole: dict[str, torch.Tensor] = {}
    for file in checkpoint.files:
        if file.endswith(".safetensors"):
            with safe_open(checkpoint.path / file, framework="pt") as shard:
                spans = json.loads(shard.metadata()["spans"])
                for key in shard.keys():  # noqa: SIM118 (not a dictionary)
                    kind, _, name = key.rpartition("/")
                    if name == "patterns":
                        whole[name] = shard.get_tensor(key)
                        continue
                    flat = whole.setdefault(key, torch.full(shapes[name], float("nan")).flatten())
                    start, stop = spans[name]
                    flat[start:stop] = shard.get_tensor(key)
    steps = [described["step"] for described in checkpoint.state["parameters"].values()]
    return whole | {"steps": torch.tensor(steps)}


def losses_in(project: Path) -> list[float]:
    lines = (project / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def next_pattern(project: Path, step: int) -> tuple[int, list[bool], dict[str, list[int]]]:
    """The first selection at or after ``step`` (where there is none, the last), its triplets, and those that are held.

    From the newest checkpoint.
    """
    checkpoint = newest_checkpoint(project / "run" / "checkpoints")
    assert checkpoint is not None
    steps = checkpoint.state["allocator"]["allocation_steps"]
    index = next((k for k, made in enumerate(steps) if made >= step), -1)
    return steps[index], whole_tensors(checkpoint)["patterns"][index].tolist(), checkpoint.state["triplets"]


# ------------------------------------------------------------------------------------------------------------ checks


def new_project(model: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "model").symlink_to(model)
    return folder


def assert_continues_exactly(
    project: Path, engine: str, expected: list[Result], stop: tuple[int, int], **changes: Any
) -> None:
    """Stopped at (step, micro-step), continued in a new process: as if nothing had been."""
    world_size = WORLD_SIZES[engine]
    config = configuration(project, world_size, **changes)
    assert run_ranks(world_size, run, engine, config, stop, timeout=400) == [None] * world_size
    again = configuration(project, world_size, resume="auto", **changes)
    for result, wanted in zip(run_ranks(world_size, run, engine, again, timeout=400), expected, strict=True):
        assert result.first_step == stop[0] // config.train.checkpoint_every * config.train.checkpoint_every
        assert result.engine == engine and result.losses == wanted.losses and len(result.losses) == STEPS
        assert result.patterns == wanted.patterns
        for name, tensor in (*wanted.state.items(), *wanted.adapters.items()):
            assert torch.equal({**result.state, **result.adapters}[name], tensor), name
        for mine, theirs in zip(result.averages, wanted.averages, strict=True):
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[kind], theirs[kind]) for kind in mine)
        assert without_speed(result.metrics) == without_speed(wanted.metrics)


def without_speed(metrics: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in metrics.splitlines()]
    assert [record["step"] for record in records] == list(range(STEPS))
    # Of the machine; and what is measured at log lines alone, which a continued run is free to write elsewhere.
    left_out = ("tokens_per_second", "seconds", "peak_memory_gib", "orthogonality")
    return [{key: value for key, value in record.items() if key not in left_out} for record in records]


def assert_continues_elsewhere(
    model: Path,
    folder: Path,
    engine: str,
    world_size: int,
    other: str,
    other_size: int,
    stop: int = 25,
    packs: tuple[bool, bool] = (True, True),
) -> float:
    """State equal bit for bit, next pattern identical. Returns the relative difference of the next loss.

    From step ``STEPS - FINAL`` on the pattern is frozen: stopped after it, pruned triplets are in memory no more.

    Args:
        packs: ``pack_adapters`` of the run, and of the one that continues elsewhere.
    """
    project = new_project(model, folder / "project")
    changes: dict[str, Any] = {"dropout": 0.0, "keep_checkpoints": STEPS, "pack_adapters": packs[0]}
    later = -(-stop // INTERVAL) * INTERVAL + 1  # the next selection is in between
    run_ranks(world_size, run, engine, configuration(project, world_size, **changes), (stop, 1), timeout=400)
    there = folder / "there"
    shutil.copytree(project, there, symlinks=True)
    for where, name, size, resaved in ((project, engine, world_size, None), (there, other, other_size, folder / "re")):
        config = configuration(where, size, resume="auto", **{**changes, "pack_adapters": packs[where is there]})
        run_ranks(size, run, name, config, (later, 0), resaved, timeout=400)
    for where, size in ((project, world_size), (there, other_size)):
        newest = newest_checkpoint(where / "run" / "checkpoints")
        assert newest is not None and (newest.step, newest.run["num_processes"]) == (later, size)
    before = whole_tensors(checkpoint_at(project / "run" / "checkpoints" / f"step-{stop:08d}"))
    after = whole_tensors(checkpoint_at(folder / "re" / f"step-{stop:08d}"))
    assert before.keys() == after.keys() and len(before) > 70
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    mine, theirs = losses_in(project), losses_in(there)
    assert len(mine) == len(theirs) == later and mine[:stop] == theirs[:stop]
    assert next_pattern(project, stop) == next_pattern(there, stop)
    held = [len(triplets) for triplets in next_pattern(there, stop)[2].values()]
    assert sum(held) == (NUM_TRIPLETS if later <= STEPS - FINAL else NUM_TRIPLETS // 2)
    return abs(theirs[stop] / mine[stop] - 1)
