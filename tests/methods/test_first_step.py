"""The first step finds what source code does not tell: adapters that a model goes past, or that cannot learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from adalora_dist.io.errors import UserError
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.protocol import trained_parameters
from adalora_dist.sharding.tensors import with_every_gradient
from tests.support.engine_steps import backward_and_step, shard_blocks, wrapped
from tests.support.models import config
from tests.support.ranks import import_deepspeed, run_ranks

import_deepspeed()

FORWARDS = {
    "called": "return self.b(self.a(x.to(self.b.weight.dtype)))",
    "past": "return torch.nn.functional.linear(self.a(x), self.b.weight)",
    "idle": "return self.a(x)",
    "at random": "return self.a(x) if self.training else x @ self.b.weight",
    "again in backward": "return checkpoint(lambda x: self.b(self.a(x)), x, use_reentrant=True)",
    "detached": "return self.b(self.a(x)).detach()",
    "without a graph": "y = torch.no_grad()(lambda x: self.b(self.a(x)))(x); return y",
    "never": "return x",
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)


class Net(nn.Module):
    """Its blocks' forward is made of text, so that nobody can look up its source."""

    def __init__(self, forward: str) -> None:
        super().__init__()
        made: dict[str, Any] = {}
        exec(  # noqa: S102
            "import torch\nfrom torch.utils.checkpoint import checkpoint\n"
            f"def forward(self, x):\n    {forward}\n", made,
        )  # fmt: skip
        self.blocks = nn.ModuleList([type("Written", (Block,), {"forward": made["forward"]})()])
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks[0](x))


def first_step(rank: int, world_size: int, kind: str, engine: str = "single") -> tuple[str, list[str]]:
    """What is raised in the first step, and what is said after it."""
    torch.manual_seed(0)
    model: Any = Net(FORWARDS[kind])
    settings = config(targets=("a", "b"), train_modules=("head",))
    adapt(model, settings)
    if engine == "fsdp2":
        shard_blocks(model)
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    hooks = attach(model, optimizer, settings, 20)
    x = torch.randn(3, 4, requires_grad=kind == "again in backward")
    model, optimizer = wrapped(engine, model, optimizer, 3)
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()
    try:
        for _ in range(2):
            loss = model(x).square().mean()
            if engine == "ddp":
                loss = with_every_gradient(loss, list(trained_parameters(model).values()))
            backward_and_step(engine, model, optimizer, loss)
    except UserError as error:
        return str(error), []
    finally:
        hooks.detach()
    return "", hooks.notices(1, lambda step: 1.0)


def check(kind: str, raised: str, said: list[str]) -> None:
    if kind in ("called", "again in backward"):
        assert (raised, said) == ("", [])
    elif kind in ("idle", "at random"):
        [line] = said
        assert not raised and "1 of 2 adapters (b; the first is blocks.0.b) had no part in this step" in line
    elif kind == "past":
        assert "computes with the weight of blocks.0.b itself" in raised and "leave b out of targets" in raised
    else:
        verb = "is called" if kind == "never" else "gets a gradient"
        assert raised.startswith("none of the 2 adapters of ") and f"{verb} in the first step" in raised


@pytest.mark.parametrize("kind", FORWARDS)
def test_what_each_forward_is_told(kind: str) -> None:
    [(raised, said)] = run_ranks(1, first_step, kind)
    check(kind, raised, said)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("kind", ["called", "past", "idle", "without a graph"])
def test_on_every_engine(kind: str, engine: str) -> None:
    for raised, said in run_ranks(2, first_step, kind, engine):
        check(kind, raised, said)


def test_experts_without_a_token_are_no_mistake() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.experts[0](x))

    model, settings = Experts(), config(targets=("experts.1",), train_modules=("head",))
    adapt(model, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    hooks = attach(model, optimizer, settings, 20)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    hooks.detach()
    assert "1 of 1 adapters" in hooks.notices(0, lambda step: 1.0)[0]


def test_a_loop_that_asks_for_nothing_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """As in HF Trainer, or a loop of one's own: no call besides the optimizer's."""
    model, settings = Net(FORWARDS["idle"]), config(targets=("a", "b"), train_modules=("head",))
    adapt(model, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    hooks = attach(model, optimizer, settings, 20)
    for _ in range(4):
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    hooks.detach()
    [line] = caplog.messages
    assert "1 of 2 adapters (b; the first is blocks.0.b) had no part in this step" in line


def test_nothing_is_left_behind() -> None:
    model, settings = Net(FORWARDS["called"]), config(targets=("a", "b"), train_modules=("head",))
    adapters = adapt(model, settings)
    num_hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    hooks = attach(model, optimizer, settings, 20)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    hooks.detach()
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == num_hooks
    assert all(adapter.noted is None for adapter in adapters)
