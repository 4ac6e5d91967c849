"""A new engine is one class and one line in the table: allocator and compaction know none by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adalora_dist import sharding
from adalora_dist.io.errors import UserError
from adalora_dist.methods.hooks import MethodHooks, attach
from adalora_dist.sharding.base import ShardEngine
from adalora_dist.sharding.plain import PlainEngine
from tests.support.models import adapted_net, config, global_batch

SETTINGS = config(init_rank=5, target_budget=7, initial_warmup_steps=4, final_steps=10, mask_interval_steps=3)
STEPS = 30


class Own:
    """What a new engine wraps a torch optimizer in."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


class OwnEngine(PlainEngine):
    """Holds everything, and says what it was asked."""

    asked: list[str] = []

    @classmethod
    def claims(cls, params: Any, optimizer: Any) -> bool:
        return isinstance(optimizer, Own)

    def write(self, indices: Any, values: Any) -> None:
        self.asked.append("write")
        super().write(indices, values)

    def shrink(self, model: Any, optimizer: Any, shrinks: Any) -> None:
        self.asked.append("shrink")
        super().shrink(model, optimizer, shrinks)


def run(wrap: Any) -> tuple[list[float], Any, MethodHooks]:
    model: Any = adapted_net(SETTINGS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-3)
    hooks = attach(model, optimizer, SETTINGS, STEPS)
    wrapped = wrap(optimizer)
    hooks.bind(wrapped)
    losses = []
    for step in range(STEPS):
        x, y = global_batch(step)
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        hooks.replace(model, wrapped)
    hooks.finish()
    allocator: Any = hooks.method_step
    assert allocator.compacted
    return losses, hooks.updates(), hooks


def test_an_engine_in_the_table_is_used_from_the_first_step_through_compaction(monkeypatch: Any) -> None:
    expected, adapters, hooks = run(lambda optimizer: optimizer)
    assert type(hooks.engine) is PlainEngine
    engines: tuple[type[ShardEngine], ...] = (OwnEngine, *sharding.ENGINES)
    monkeypatch.setattr(sharding, "ENGINES", engines)
    losses, own, hooks = run(Own)
    assert type(hooks.engine) is OwnEngine and losses == expected
    assert {"write", "shrink"} <= set(OwnEngine.asked)
    for mine, theirs in zip(own, adapters, strict=True):
        assert torch.equal(mine.delta(), theirs.delta())


def test_parameters_that_no_engine_claims_are_an_error() -> None:
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    optimizer = torch.optim.SGD(params[:1], lr=0.1)
    assert sharding.claimant(params[:1], optimizer) is PlainEngine and sharding.claimant(params, optimizer) is None
    assert sharding.claimant(params, None) is None
    with pytest.raises(UserError, match="2 of 3 parameters are not in the optimizer"):
        sharding.select_engine(params, optimizer)
