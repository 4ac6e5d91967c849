"""Rows packed and padded, under every engine: the same losses, the same gradients of every weight, equal ranks."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from adalora_dist.config.methods import method_config
from adalora_dist.config.sections import RunConfig, TrainConfig
from adalora_dist.methods.inject import adapt
from adalora_dist.sharding.base import assemble
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.tasks.losses import causal_loss
from adalora_dist.tasks.packing import positions_of
from adalora_dist.tasks.rows.tokens import IGNORED
from adalora_dist.training.engine import build_accelerator
from adalora_dist.training.loop import train
from adalora_dist.training.prepared import prepare
from adalora_dist.training.run_folder import RunFolder
from tests.support.packed_models import some_rows, tiny
from tests.support.quantized_runs import environment
from tests.support.ranks import import_deepspeed, run_ranks

import_deepspeed()

STEPS, BATCH, MICRO = 3, 12, 3
FAMILIES, ENGINES = ("llama", "qwen2", "gpt2"), ("ddp", "fsdp2", "zero3")
DEFAULT = {("llama", "zero3"), ("gpt2", "fsdp2"), ("qwen2", "ddp")}


class Seen(NamedTuple):
    """Of each step its loss and, by weight, the whole gradient that the optimizer was given."""

    losses: list[float]
    gradients: list[dict[str, torch.Tensor]]


def trained(rank: int, world_size: int, family: str, engine: str, packed: bool, output_dir: str) -> Seen:
    """The shared loop on rows of unequal lengths and unequal shares of targets.

    At a learning rate that no weight of float32 can see, so that every step is comparable, not the first alone.
    """
    rows = some_rows(STEPS * BATCH)
    for number, row in enumerate(rows):  # ranks and micro-batches have different numbers of targets
        first = min(1 + number % 5, len(row["input_ids"]) - 1)
        row["labels"] = [IGNORED] * first + row["input_ids"][first:]
    training = TrainConfig(
        batch_size=BATCH, micro_batch_size=MICRO, max_steps=STEPS, precision="fp32", max_grad_norm=0,
        checkpoint_every=0, learning_rate=1e-30, weight_decay=0, output_dir=output_dir, overwrite=True,
    )  # fmt: skip
    settings = RunConfig(adapter=method_config("full"), train=training)
    model = tiny(family)  # before DeepSpeed is there: it would draw other weights
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(engine).items():
            patch.setenv(name, value.replace("True", "False") if "INIT" in name else value)
        accelerator = build_accelerator(training)
    if engine == "zero3":
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    adapt(model, settings.adapter, seed=1)
    prepared = prepare(accelerator, model, settings, STEPS)
    plan = BatchPlan.of_rows(rows, BATCH, 3, False)  # type: ignore[arg-type]
    assert positions_of(plan, MICRO, world_size, False)[2] < 0.9 * positions_of(plan, MICRO, world_size, False)[1]
    gradients: list[dict[str, torch.Tensor]] = []
    method_step = prepared.hooks.method_step
    before = method_step.before

    def look(is_last: Any) -> None:
        engine, found = prepared.hooks.engine, {}
        shapes, spans = engine.shapes(), engine.spans()
        for name, shape, span, gradient in zip(prepared.parameters, shapes, spans, engine.gradients(), strict=True):
            if gradient is not None:
                found[name] = assemble(gradient.detach().reshape(-1).float(), span, shape, engine.shard_group).clone()
        if prepared.hooks._firing == 0:
            gradients.append({})
        gradients[-1].update(found)
        before(is_last)

    method_step.before = look  # type: ignore[method-assign]
    loss_sum = causal_loss(rows, 0, accelerator.device, packed=packed)  # type: ignore[arg-type]
    losses = train(accelerator, prepared, plan, loss_sum, settings, RunFolder(settings, rank == 0, {}), lambda _: None)
    return Seen(losses, gradients)


@lru_cache
def on_one_process(family: str, folder: str) -> Seen:
    """Padded."""
    return run_ranks(1, trained, family, "single", False, folder)[0]


def compare(found: Seen, expected: Seen) -> None:
    """Losses, and every weight's gradient, within 1e-5 of what is largest in that weight's."""
    assert found.losses == pytest.approx(expected.losses, rel=1e-5) and len(found.gradients) == STEPS
    for step, whole in zip(found.gradients, expected.gradients, strict=True):
        assert step.keys() == whole.keys() and len(whole) > 20
        for name, gradient in whole.items():
            # A bias of keys has no gradient but for rounding: it moves all scores of a query alike.
            largest = max(float(gradient.abs().max()), 1e-3 * max(float(g.abs().max()) for g in whole.values()))
            assert float((step[name] - gradient).abs().max()) <= 1e-5 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_one_process(family: str, tmp_path: Path) -> None:
    padded = on_one_process(family, str(tmp_path / "padded"))
    assert len({round(loss, 5) for loss in padded.losses}) == STEPS
    compare(run_ranks(1, trained, family, "single", True, str(tmp_path))[0], padded)


@pytest.mark.parametrize(
    ("family", "engine"),
    [
        pytest.param(family, engine, marks=[pytest.mark.slow] * ((family, engine) not in DEFAULT))
        for engine in ENGINES
        for family in FAMILIES
    ],
)
def test_two_processes(family: str, engine: str, tmp_path: Path) -> None:
    expected = on_one_process(family, str(tmp_path / "single"))
    for packed in (True, False):
        ranks = run_ranks(2, trained, family, engine, packed, str(tmp_path / f"{packed}"))
        for seen in ranks:
            compare(seen, expected)
        first, second = ranks
        assert first.losses == second.losses
        for one, two in zip(first.gradients, second.gradients, strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one)
