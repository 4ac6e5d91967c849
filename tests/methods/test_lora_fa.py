"""LoRA-FA: LoRA's function and gradients, A stands still, and no input is kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from adalora_dist.config.methods import LoraConfig, LoraFaConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.lora_fa import LoraFa, LoraFaLinear, frozen_a

TOKENS, D_IN, D_OUT, RANK = 31, 64, 48, 4


def layer(method: str = "lora_fa", **changes: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    config = (LoraFaConfig if method == "lora_fa" else LoraConfig)(targets=("0",), init_rank=RANK, **changes)
    adapt(model, config, seed=5)
    return model[0]


def saved_shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """Of all that autograd keeps of a forward, parameters aside; the input needs a gradient, as in a deep model."""
    kept = []
    own = {p.data_ptr() for p in module.parameters()}
    x = torch.randn(TOKENS, D_IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    return [tuple(t.shape) for t in kept if t.data_ptr() not in own]


def test_no_input_is_kept_for_backward() -> None:
    numel = TOKENS * D_IN
    assert all(torch.Size(shape).numel() < numel for shape in saved_shapes(layer()))
    assert (TOKENS, RANK) in saved_shapes(layer())
    assert any(torch.Size(shape).numel() >= numel for shape in saved_shapes(layer("lora"))), "there is one to save"


def test_it_is_lora_with_that_a() -> None:
    """Against PEFT's LoRA layer, float64: forward, gradients, and merged weight."""
    peft = pytest.importorskip("peft")
    own = layer(alpha=6.0).double()
    [a] = own.drawn.matrices
    theirs = nn.Sequential(nn.Linear(D_IN, D_OUT).double())
    theirs[0].load_state_dict(own.base.state_dict())
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["0"])).double()
    lora = model.base_model.model[0]
    with torch.no_grad():
        own.P.normal_()
        lora.lora_A["default"].weight.copy_(a)
        lora.lora_B["default"].weight.copy_(own.P)
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(TOKENS, D_OUT, dtype=torch.float64)
    (of_x, of_p) = torch.autograd.grad((own(x) * direction).sum(), [x, own.P])
    y = model(x)
    (their_x, their_b) = torch.autograd.grad((y * direction).sum(), [x, lora.lora_B["default"].weight])
    torch.testing.assert_close(own(x), y, rtol=0, atol=1e-12)
    torch.testing.assert_close(of_x, their_x, rtol=0, atol=1e-12)
    torch.testing.assert_close(of_p, their_b, rtol=0, atol=1e-12)
    [update] = LoraFa.updates({own.name: own.description()}, {}, None, lambda name: own.P.detach().float())
    merged = update.merged(own.base.weight.detach().float().clone())
    torch.testing.assert_close(
        merged.double(), lora.base_layer.weight + lora.get_delta_weight("default"), atol=1e-5, rtol=0
    )


def test_the_projected_forms_first_step_is_that_of_pefts_optimizer() -> None:
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_lorafa_optimizer
    from peft.optimizers import lorafa as theirs

    settings = LoraFaConfig(targets=("0",), init_rank=RANK, alpha=6.0, projected=True)
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(D_IN, D_OUT))
    base = {name: value.clone() for name, value in model[0].state_dict().items()}
    adapt(model, settings, seed=5)
    [a] = model[0].drawn.matrices
    other = nn.Sequential(nn.Linear(D_IN, D_OUT))
    other[0].load_state_dict(base)
    wrapped = peft.get_peft_model(other, peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["0"]))
    lora = wrapped.base_model.model[0]
    with torch.no_grad():
        lora.lora_A["default"].weight.copy_(a)
    optimizer = torch.optim.AdamW(model[0].parameters(recurse=False), lr=1e-2, eps=1e-6, weight_decay=0)
    hooks = attach(model, optimizer, settings, 1)
    with pytest.MonkeyPatch.context() as patch:  # it rounds to bfloat16 where it can
        patch.setattr(theirs, "is_bf16_available", lambda: False)
        of_peft = create_lorafa_optimizer(wrapped, r=RANK, lora_alpha=6, lr=1e-2)
        x, target = torch.randn(TOKENS, D_IN), torch.randn(TOKENS, D_OUT)
        for net, stepped in ((model, optimizer), (wrapped, of_peft)):
            # Large gradients: PEFT's eps counts 31 times as much at the first step.
            (1000 * (net(x) - target).square().sum()).backward()
            stepped.step()
    hooks.finish()
    assert model[0].P.abs().max() > 5e-3
    torch.testing.assert_close(model[0].P, lora.lora_B["default"].weight, rtol=0, atol=3e-6)


def test_a_is_a_matter_of_the_seed_alone() -> None:
    first, second = layer(), layer()
    assert torch.equal(first.drawn.matrices[0], second.drawn.matrices[0])
    assert list(first.trained()) == ["0.P"] and first.part_size == D_OUT * RANK
    assert not dict(first.named_buffers()) and "drawn" not in str(first.state_dict().keys())
    half = first.drawn.like(torch.zeros(1, dtype=torch.bfloat16))[0]
    assert half.dtype == torch.bfloat16 and first.drawn.like(half)[0] is half


def test_another_generator_is_noticed() -> None:
    own: LoraFaLinear = layer()
    described = own.description()
    for key, value in (("seed", described["seed"] + 1), ("sha256", "0")):
        with pytest.raises(UserError, match="draws other numbers from this seed"):
            LoraFa.updates({own.name: described | {key: value}}, {}, None, lambda name: own.P.detach())
    assert frozen_a(1, 2, 3).digest() != frozen_a(2, 2, 3).digest()


def test_its_start_is_the_plain_model_also_with_dropout() -> None:
    own, x = layer(dropout=0.5), torch.randn(3, 5, D_IN)
    assert torch.equal(own(x), own.base(x))
    with torch.no_grad():
        own.P.normal_()
    own.train()
    assert not torch.equal(own(x), own(x))
    own.eval()
    assert torch.equal(own(x), own(x)) and own(x).shape == (3, 5, D_OUT)
