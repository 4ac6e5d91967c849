"""How runs start: each triplet's update grows as LoRA's does, at every width and rank, under AdamW and SGD."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from adalora_dist.config.methods import AdaLoraConfig, MethodConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.growth import SMALLEST_GROWTH, growth
from adalora_dist.methods.adalora.layers import SVDLinear
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt, parameter_groups
from tests.support.models import adapted_net, config, global_batch
from tests.support.settings import adapter_section

RATE = 1e-4


class OneMatrix(nn.Module):
    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.map = nn.Linear(d_in, d_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(x)


TOKENS = 4  # of an input
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=RATE),
}


def settings(method: str, rank: int, **changes) -> MethodConfig:
    values = dict(init_rank=rank, target_rank=1, alpha=2 * rank, targets=("map",), final_steps=1)
    return adapter_section(method, **{**values, **changes})


def factors_after(config: MethodConfig, d_in: int, d_out: int, optimizer: str, num_steps: int) -> SVDLinear:
    """The adapter of one matrix after some steps on TOKENS inputs each."""
    torch.manual_seed(0)
    model = OneMatrix(d_in, d_out)
    [layer] = adapt(model, config, seed=1)
    opt = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    attach(model, opt, config, total_steps=100).detach()
    generator = torch.Generator().manual_seed(2)
    for _ in range(num_steps):
        x, target = (torch.randn(TOKENS, d, generator=generator) for d in (d_in, d_out))
        (model(x) - target).square().sum().backward()
        opt.step()
        opt.zero_grad()
    return layer


def updates(layer: SVDLinear) -> torch.Tensor:
    """s lambda_i P_i: what each triplet adds per unit of Q_i x, (d_out, r)."""
    return (layer.scale * layer.P * layer.lam).detach()


WIDTHS = [(64, 64), (64, 300), (384, 384), (384, 1536), (1536, 384), (4096, 1024), (8192, 64), (64, 8192), (8192, 1024)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
@pytest.mark.parametrize("rank", [1, 6, 16])
def test_the_first_step_is_loras(optimizer, d_in, d_out, rank):
    """With the regulariser as it is by default; Q begins as LoRA's A, and P moves exactly as B does."""
    lora, adalora = (
        factors_after(settings(method, rank), d_in, d_out, optimizer, num_steps=1) for method in ("lora", "adalora")
    )
    assert lora.P.abs().max() > 0
    assert torch.equal(adalora.P, lora.P)
    # P was 0 before the step: lambda had no gradient, and Q the regulariser's alone.
    assert torch.equal(adalora.lam, torch.ones(rank))
    assert (adalora.Qt - lora.Qt).abs().max() <= RATE * 1.0001


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
def test_the_next_steps_grow_as_loras(optimizer, d_in, d_out):
    """lambda has moved by at most the learning rate per step, and the gradients with it: a few parts in a thousand."""
    rank, steps = 4, 5
    lora = updates(factors_after(settings("lora", rank), d_in, d_out, optimizer, steps))
    adalora = updates(factors_after(settings("adalora", rank), d_in, d_out, optimizer, steps))
    growth = adalora.norm(dim=0) / lora.norm(dim=0)
    assert ((growth - 1).abs() < 0.02).all()
    assert (nn.functional.cosine_similarity(adalora, lora, dim=0) > 0.99).all()


def test_the_published_start_hardly_grows():
    """What ``matched`` is there for: after ten steps of Adam a hundredth of LoRA's update and less."""
    lora, paper = (
        factors_after(c, 384, 384, "adamw", num_steps=10)
        for c in (settings("lora", 4), settings("adalora", 4, start="paper"))
    )
    sizes = [(updates(x).norm(dim=0) * x.Qt.detach().norm(dim=0)).mean() for x in (lora, paper)]
    assert sizes[1] < 0.05 * sizes[0]


def test_the_model_starts_as_the_plain_one_and_lambda_is_trained():
    model = adapted_net(config(start="matched", init=None))
    plain = adapted_net(config(start="paper"))
    x, _ = global_batch(0)
    assert torch.equal(model(x), plain(x))
    assert model.adalora.lam.requires_grad and torch.equal(model.adalora.lam, torch.ones(12))


def test_paper_is_the_published_start():
    layer = factors_after(settings("adalora", 4, start="paper"), 400, 300, "adamw", num_steps=0)
    expected = torch.Generator().manual_seed(1)
    for x in (layer.P, layer.Qt):
        assert torch.equal(x, torch.randn(x.shape, generator=expected) * 0.02)
    assert torch.equal(layer.lam, torch.zeros(4))


def test_init_is_refused_where_it_would_not_be_read():
    with pytest.raises(UserError) as caught:
        AdaLoraConfig(init="gaussian")
    said = str(caught.value)
    assert "init gaussian with start matched" in said and "set start to paper" in said
    assert AdaLoraConfig(init="gaussian", start="paper").regulariser == "norm"
    assert AdaLoraConfig().regulariser == "directions"
    assert AdaLoraConfig(orthogonality_form="squared").regulariser == "squared"


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_rslora_scales_by_the_root_of_the_rank(method):
    made = factors_after(settings(method, 9, alpha=6, rslora=True), 8, 8, "sgd", num_steps=0)
    assert made.scale == 6 / math.sqrt(9)


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_lora_plus_moves_p_faster_and_nothing_else(method):
    layers = []
    for ratio in (1.0, 16.0):
        c = config(method=method, start="matched", init=None, lora_plus_ratio=ratio, orthogonality=0.0)
        model = adapted_net(c)
        opt = torch.optim.SGD(parameter_groups(model, c, RATE))
        attach(model, opt, c, total_steps=45).detach()
        x, y = global_batch(0)
        (model(x) - y).square().sum().backward()
        opt.step()
        layers.append((model.blocks[0].up, [g["lr"] for g in opt.param_groups]))
    (slow, rates), (fast, fast_rates) = layers
    assert rates == [RATE] and fast_rates == [RATE, 16 * RATE]
    torch.testing.assert_close(fast.P, 16 * slow.P)
    assert torch.equal(fast.Qt, slow.Qt)  # whose gradient was 0


def test_parameter_groups_hold_everything_once():
    c = config(start="matched", init=None, lora_plus_ratio=4.0, train_modules=("head",))
    model = adapted_net(c)
    rest, ps = parameter_groups(model, c, 1.0)
    assert {id(p) for g in (rest, ps) for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(rest["params"]) + len(ps["params"]) == sum(p.requires_grad for p in model.parameters())
    assert [len(ps["params"]), rest["lr_ratio"], ps["lr_ratio"]] == [4, 1.0, 4.0]


def test_an_optimizer_without_the_ratio_is_refused():
    c = config(lora_plus_ratio=4.0)
    model = adapted_net(c)
    with pytest.raises(UserError, match="lora_plus_ratio=4, but the optimizer gives P and Q one learning rate"):
        attach(model, torch.optim.AdamW(model.parameters()), c, total_steps=45)


def grown(start: str, rate: float, num_steps: int, seed: int = 0) -> float:
    """The growth of a whole small model after some steps of AdamW."""
    c = config(start=start, init=None, initial_warmup_steps=20)
    model = adapted_net(c, seed, d=64, hidden=128)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    hooks = attach(model, opt, c, total_steps=45)
    hooks.detach()
    for step in range(num_steps):
        x, y = global_batch(step, d=64)
        (model(x) - y).square().mean().backward()
        opt.step()
        opt.zero_grad()
    layers = hooks.method_step.layers
    found = growth(hooks.method_step.bound, layers, [rate] * num_steps)
    layers = [layer.requires_grad_(False) for layer in layers]
    sizes = [x.P.norm(dim=0) * x.lam.detach().abs() * x.Qt.norm(dim=0) / (x.d_out / 3) ** 0.5 for x in layers]
    assert found == pytest.approx(float(torch.cat(sizes).mean()) / rate / num_steps**0.5, rel=1e-4)
    return found


def test_growth_tells_a_start_that_learns_from_one_that_does_not():
    assert 0.9 < grown("matched", 1e-4, 1) < 1.1  # a step of Adam moves every element of P by the rate
    assert grown("matched", 1e-4, 10) > 1 > SMALLEST_GROWTH > grown("paper", 1e-4, 10)


@pytest.mark.parametrize(("start", "warned"), [("matched", False), ("paper", True)])
def test_pruning_of_noise_is_warned_of_in_one_line(start, warned):
    c = config(start=start, init=None)
    model = adapted_net(c, d=64, hidden=128)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    hooks = attach(model, opt, c, total_steps=45)
    assert hooks.method_step.notice(4, lambda _: 1e-4) == "", "no step was made: a loss scale may skip them all"
    hooks.detach()
    for step in range(5):
        x, y = global_batch(step, d=64)
        (model(x) - y).square().mean().backward()
        opt.step()
        opt.zero_grad()
    line = hooks.method_step.notice(4, lambda _: 1e-4)
    assert "\n" not in line and line.startswith("warning: pruning begins before") == warned
    assert ("use start matched or a higher learning_rate or more initial_warmup_steps than 4" in line) == warned
