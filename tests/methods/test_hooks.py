"""The guard that every method has: a step with a non-finite gradient is left out, on every engine."""

import functools
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adalora_dist.config.sections import TrainConfig
from adalora_dist.methods import METHODS, method_for
from adalora_dist.methods.hooks import attach
from tests.support.engine_steps import backward_and_step
from tests.support.models import adapted_net, config, global_batch
from tests.support.ranks import import_deepspeed, run_ranks
from tests.support.tiny_language_model import tiny_llama

deepspeed = import_deepspeed()

STEPS = 24
POISONED_STEP = 4
assert tiny_llama  # what ranks will import, for a prefix
WORLD_SIZE = {"single": 1, "ddp": 2, "fsdp2": 2, "zero2": 2, "zero3": 2}
CASES = [
    pytest.param(method, engine, marks=[pytest.mark.slow] * (engine == "zero2"))
    for method in METHODS
    for engine in WORLD_SIZE
]


def settings_of(method: str) -> Any:
    return config(method=method, train_modules=() if method == "full" else ("head",))


def train(rank: int, world_size: int, method: str, engine: str, poisoned: bool) -> dict[str, Any]:
    settings = settings_of(method)
    model: Any = adapted_net(settings)
    if engine == "fsdp2":
        fully_shard(model)
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    if method == "galore":
        optimizer = method_for(settings).optimizer(model, TrainConfig(learning_rate=2e-2))
    hooks = attach(model, optimizer, settings, STEPS)
    if engine == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=False)
    elif engine.startswith("zero"):
        stage = {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0}
        zero = {"train_micro_batch_size_per_gpu": 6, "zero_optimization": stage, "zero_allow_untested_optimizer": True}
        model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero)
    hooks.bind(model if engine.startswith("zero") else optimizer)
    losses, values = [], []
    for step in range(STEPS):
        x, y = (t.chunk(world_size)[rank] for t in global_batch(step))
        loss = (model(x) - y).square().mean()
        if poisoned and step == POISONED_STEP and rank == world_size - 1:
            loss = loss * torch.nan
        values.append([hooks.engine.full(k) for k in range(len(hooks.engine.shapes()))])
        backward_and_step(engine, model, optimizer, loss)
        hooks.catch_up(step + 1)  # ZeRO leaves such a step out by itself
        losses.append(loss.item())
    skipped, seen = hooks.num_skipped_steps, hooks.step
    hooks.finish()
    trained = [hooks.engine.full(k) for k in range(len(hooks.engine.shapes()))]
    return {
        "losses": losses,
        "skipped": skipped,
        "steps": seen,
        "before": values,
        "trained": trained,
    }


def train_all(rank: int, world_size: int, engine: str, poisoned: bool) -> dict[str, dict[str, Any]]:
    """One method after another, in one launch of ranks."""
    return {method: train(rank, world_size, method, engine, poisoned) for method in METHODS}


@functools.cache
def trained(engine: str, poisoned: bool) -> list[dict[str, dict[str, Any]]]:
    """What each rank saw of every method."""
    return run_ranks(WORLD_SIZE[engine], train_all, engine, poisoned, timeout=600)


@pytest.mark.parametrize(("method", "engine"), CASES)
def test_one_nan_does_not_spread(method: str, engine: str) -> None:
    for result in (results[method] for results in trained(engine, True)):
        assert result["trained"] and all(tensor.isfinite().all() for tensor in result["trained"])
        assert result["skipped"] == 1 and result["steps"] == STEPS
        around = zip(result["before"][POISONED_STEP], result["before"][POISONED_STEP + 1], strict=True)
        assert all(torch.equal(before, after) for before, after in around), "a step that is left out changes nothing"
        later = [loss for step, loss in enumerate(result["losses"]) if step != POISONED_STEP]
        assert all(loss == loss for loss in later) and sum(later[-3:]) < sum(later[:3]), "training goes on"


@pytest.mark.parametrize("method", METHODS)
def test_without_the_guard_there_would_be_something_to_guard(method: str) -> None:
    """The poison reaches the gradients; a clean run leaves out no step."""
    [results] = trained("single", False)
    clean = results[method]
    assert clean["skipped"] == 0
    moved = zip(clean["before"][POISONED_STEP], clean["before"][POISONED_STEP + 1], strict=True)
    assert any(not torch.equal(before, after) for before, after in moved)
