"""What torch's optimizers keep of a parameter can be taken out, made anew, and gone on with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adalora_dist.io.errors import UserError
from adalora_dist.sharding import select_engine
from adalora_dist.sharding.optimizer_state import keeps_an_entry_per_weight

KINDS: dict[str, dict[str, Any]] = {
    "AdamW": {}, "AdamW, amsgrad": {"amsgrad": True}, "Adam": {}, "SGD": {}, "SGD, momentum": {"momentum": 0.9},
    "RMSprop": {}, "RMSprop, centered": {"momentum": 0.9, "centered": True}, "Adagrad": {},
}  # fmt: skip


def made(kind: str, values: torch.Tensor) -> tuple[Any, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(values.clone())
    return getattr(torch.optim, kind.partition(",")[0])([parameter], lr=0.1, **KINDS[kind]), parameter


def step(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, steps: range) -> None:
    for number in steps:
        parameter.grad = torch.sin(parameter.detach() * (number + 1)) + number
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_optimizer_goes_on_exactly(kind: str) -> None:
    optimizer, parameter = made(kind, torch.arange(12.0).view(4, 3))
    assert keeps_an_entry_per_weight(optimizer)
    step(optimizer, parameter, range(4))
    engine = select_engine([parameter], optimizer)
    values = [value.clone() for value in engine.values()]
    states = [{name: value.clone() for name, value in state.items()} for state in engine.states()]
    fresh, other = made(kind, torch.zeros(4, 3))
    select_engine([other], fresh).restore(values, states)
    step(optimizer, parameter, range(4, 8))
    step(fresh, other, range(4, 8))
    assert torch.equal(parameter, other)


def test_what_keeps_something_else_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    nadam = torch.optim.NAdam([parameter])
    assert not keeps_an_entry_per_weight(nadam)
    step(nadam, parameter, range(1))
    with pytest.raises(UserError, match="state mu_product does not have one entry per weight"):
        select_engine([parameter], nadam).states()
    fresh = torch.optim.NAdam([parameter])
    with pytest.raises(UserError, match="NAdam cannot be restored before its first step: use torch's AdamW, Adam, SGD"):
        select_engine([parameter], fresh).restore([parameter.detach()], [{"step": torch.tensor(1.0)}])
    other = torch.optim.SGD([parameter], momentum=0.9)
    with pytest.raises(UserError, match="keeps momentum_buffer, saved were exp_avg"):
        select_engine([parameter], other).restore([parameter.detach()], [{"exp_avg": torch.ones(6)}])
