"""ReLoRA: restarts that change nothing but what they should, and the same run on every engine."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from adalora_dist.artifacts.checkpoints.content import load_checkpoint, stored_adapters
from adalora_dist.artifacts.checkpoints.writer import CheckpointWriter, checkpoint_at
from adalora_dist.artifacts.export import merge
from adalora_dist.config.methods import ReloraConfig
from adalora_dist.config.sections import QuantizationConfig, RunConfig, TrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods import method_for
from adalora_dist.methods.hooks import MethodHooks, attach
from adalora_dist.methods.inject import adapt, parameter_groups
from adalora_dist.methods.protocol import trained_parameters
from tests.support.engine_steps import backward_and_step, shard_blocks, wrapped
from tests.support.models import Net, global_batch
from tests.support.ranks import import_deepspeed, run_ranks
from tests.support.tiny_language_model import logits, tiny_gpt2, tiny_llama

deepspeed = import_deepspeed()

STEPS, EVERY, WARMUP, GLOBAL_BATCH, LR = 22, 8, 3, 24, 2e-2
"""Restarts after 8 and 16 steps."""
STOPS = (12, 16)
"""In the middle of a cycle, and at a restart."""


def settings(**changes: Any) -> ReloraConfig:
    values = {"init_rank": 3, "alpha": 6, "targets": ("up", "down")}
    return ReloraConfig(**{**values, "restart_every_steps": EVERY, "restart_warmup_steps": WARMUP, **changes})


def step_once(model: Any, optimizer: torch.optim.Optimizer, hooks: MethodHooks, step: int) -> str:
    x, y = global_batch(step, GLOBAL_BATCH)
    (model(x) - y).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return hooks.replace(model, optimizer)


# --------------------------------------------------------------------------------------------------------- one process


def two_restarts(rank: int, world_size: int) -> None:
    torch.manual_seed(0)
    model: Any = Net()
    plain = copy.deepcopy(model)
    layers: Any = adapt(model, settings(train_modules=("head",)))
    optimizer = torch.optim.AdamW(parameter_groups(model, settings(), LR), lr=LR)
    hooks = attach(model, optimizer, settings(), STEPS)
    x = global_batch(99, 16)[0]
    past: list[dict[str, tuple[torch.Tensor, torch.Tensor]]] = []
    moved, rates = set(), []
    optimizer.register_step_pre_hook(lambda opt, *_: rates.append(opt.param_groups[0]["lr"] / LR))
    for step in range(STEPS):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            factors = {layer.name: (layer.P.clone(), layer.Qt.clone()) for layer in layers}
        done = step_once(model, optimizer, hooks, step)
        if step < EVERY - 1:
            moved |= {n.rpartition(".")[2] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert bool(done) == (step + 1 in (8, 16)), step
        if done:
            head = optimizer.state[model.head.weight]
            assert head["step"] == step + 1 and head["exp_avg"].abs().sum() > 0  # what is no adapter goes on
            assert not any(optimizer.state.get(p) for layer in layers for p in (layer.P, layer.Qt))
            assert all(layer.P.abs().sum() == 0 and layer.Qt.abs().sum() > 0 for layer in layers)
            past.append(factors)
        elif step + 1 in (7, 15):
            reached = _output(model, x)
    assert moved >= {"P", "Qt"} and len(past) == 2  # both factors learn in the first cycle
    warm = [1 / 3, 2 / 3, 1.0]
    assert rates == pytest.approx([1.0] * 8 + warm + [1.0] * 5 + warm + [1.0] * 3)
    assert reached.isfinite().all()

    # W is the original and both cycles, rounded once.
    updates = {update.name: update for update in hooks.updates()}
    for layer in layers:
        update, w0 = updates[layer.name], plain.get_submodule(layer.name).weight.double()
        assert update.rank == 9 and hooks.rank_pattern()[layer.name] == 9
        first, second = (update.P[:, k : k + 3].double() @ update.Q[k : k + 3].double() for k in (0, 3))
        in_place = w0 + 2 * first
        in_place += 2 * second
        torch.testing.assert_close(layer.base.weight.double(), in_place, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(update.merged(w0.float()), (layer.base.weight + 2 * layer.P @ layer.Qt.T).detach())


@torch.no_grad()
def _output(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model(x).clone()


def unchanged_by_a_restart(rank: int, world_size: int) -> None:
    torch.manual_seed(0)
    model: Any = Net()
    adapt(model, settings())
    optimizer = torch.optim.AdamW(parameter_groups(model, settings(), LR), lr=LR)
    hooks = attach(model, optimizer, settings(), STEPS)
    x = global_batch(99, 16)[0]
    start = _output(model, x)
    for step in range(EVERY):
        a, b = global_batch(step, GLOBAL_BATCH)
        (model(a) - b).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = _output(model, x)
    assert hooks.replace(model, optimizer).startswith("restart 1") and (before - start).abs().max() > 0.05
    torch.testing.assert_close(_output(model, x), before, rtol=1e-5, atol=1e-6)
    assert hooks.replace(model, optimizer) == ""  # once


def test_restarts_on_one_process() -> None:
    run_ranks(1, two_restarts)
    run_ranks(1, unchanged_by_a_restart)


# ------------------------------------------------------------------------------------------------------------- engines


def run(rank: int, world_size: int, engine: str, save: Path | None = None, resume: Path | None = None) -> Any:
    """Losses of the steps made, and in the end each base's elements here, together: one number."""
    torch.manual_seed(0)
    model: Any = Net()
    config = settings(train_modules=("head",))
    adapt(model, config, seed=3)
    if engine == "fsdp2":
        shard_blocks(model)
    optimizer = method_for(config).optimizer(model, TrainConfig(learning_rate=LR, weight_decay=0.1))
    hooks = attach(model, optimizer, config, STEPS)
    plain = model
    model, around = wrapped(
        engine, model, optimizer, GLOBAL_BATCH // world_size, persist=50
    )  # P of up stays whole, others not
    parameters = trained_parameters(plain)
    hooks.bind(around)
    first = 0
    if resume is not None:
        checkpoint = checkpoint_at(resume)
        load_checkpoint(checkpoint, parameters, around, hooks)
        first = checkpoint.step
    losses = []
    for step in range(first, STEPS):
        x, y = (t.chunk(world_size)[rank] for t in global_batch(step, GLOBAL_BATCH))
        loss = (model(x) - y).square().mean()
        backward_and_step(engine, model, optimizer, loss)
        hooks.replace(model, around)
        mean = loss.detach() / world_size
        dist.all_reduce(mean)
        losses.append(mean.item())
        if save is not None and step + 1 in STOPS:
            run_config = {"config": {"adapter": config.model_dump(mode="json")}}
            CheckpointWriter(save, 9).save(step + 1, parameters, around, hooks, run_config)
    hooks.finish()
    return losses


@functools.cache
def alone() -> list[float]:
    return run_ranks(1, run, "single")[0]


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_losses_are_those_of_one_process_and_a_run_goes_on(engine: str, tmp_path: Path) -> None:
    whole = run_ranks(2, run, engine, tmp_path)
    assert alone()[-1] < 0.8 * alone()[0] and whole[0] == pytest.approx(alone(), rel=1e-5)
    for stop in STOPS:
        again = run_ranks(2, run, engine, None, tmp_path / f"step-{stop:08d}")
        assert again[0] == whole[0][stop:]  # to the last bit
    updates, _ = stored_adapters(checkpoint_at(tmp_path / f"step-{STOPS[1]:08d}"))
    assert {update.rank for update in updates} == {9}


@pytest.mark.slow
@pytest.mark.parametrize("engine, world_size", [("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 3), ("fsdp2", 3)])
def test_every_engine_and_every_move(engine: str, world_size: int, tmp_path: Path) -> None:
    whole = run_ranks(world_size, run, engine, tmp_path)
    assert whole[0] == pytest.approx(alone(), rel=1e-5)
    for other in ("ddp", "fsdp2", "zero2", "zero3"):
        for stop in STOPS:
            again = run_ranks(2, run, other, None, tmp_path / f"step-{stop:08d}")
            assert again[0] == pytest.approx(alone()[stop:], rel=1e-5), (other, stop)


# -------------------------------------------------------------------------------------------------- exports, refusals


def exported(rank: int, world_size: int, kind: str, folder: Path) -> None:
    model: Any = {"gpt2": tiny_gpt2, "llama": lambda: tiny_llama(40)}[kind]()
    model.save_pretrained(folder / "base")
    config = ReloraConfig(init_rank=3, alpha=6, restart_every_steps=2, restart_warmup_steps=0)
    adapt(model, config)
    optimizer = torch.optim.AdamW(parameter_groups(model, config, 3e-2), lr=3e-2)
    hooks = attach(model, optimizer, config, 5)
    tokens = torch.arange(3, 15)[None]
    for _ in range(5):
        model(input_ids=tokens, labels=tokens.flip(1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        hooks.replace(model, optimizer)
    merge(hooks.updates(), folder / "base", folder / "merged", show_progress=False)
    found = logits(AutoModelForCausalLM.from_pretrained(folder / "merged"))
    assert hooks.method_step.rank_pattern().popitem()[1] == 9
    torch.testing.assert_close(found, logits(model), rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_is_exported_is_all_cycles(kind: str, tmp_path: Path) -> None:
    run_ranks(1, exported, kind, tmp_path)


def test_refusals() -> None:
    train = TrainConfig(max_steps=20)
    for changes, message in (
        ({"restart_every_steps": 20}, "restart_every_steps 20 with max_steps 20: there would be no restart"),
        ({"restart_warmup_steps": 9}, "restart_warmup_steps 9 with restart_every_steps 8"),
    ):
        with pytest.raises(UserError, match=message):
            RunConfig(adapter=settings(**changes), train=train)
    with pytest.raises(UserError, match="quantization nf4 with method relora"):
        RunConfig(adapter=settings(), train=train, quantization=QuantizationConfig(quantization="nf4"))
    model = Net()
    model.blocks[0].up.weight = torch.nn.Parameter(model.blocks[0].up.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UserError, match="blocks.0.up is a Linear, whose weight a restart could not merge into"):
        adapt(model, settings())
    with pytest.raises(UserError, match="restart_every_steps=8 in a run of 8 steps: there would be no restart"):
        method_for(settings()).step([], 8)
