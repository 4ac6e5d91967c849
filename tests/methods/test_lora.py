"""LoRA: PEFT's layer in float64, forward, gradients and merged weight, with both scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adalora_dist.config.methods import LoraConfig
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.lora import Lora

TOKENS, D_IN, D_OUT, RANK = 31, 24, 18, 4


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_it_is_pefts_lora(kind: type[nn.Module], rslora: bool) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)

    def base() -> nn.Module:
        made = nn.Linear(D_IN, D_OUT) if kind is nn.Linear else Conv1D(D_OUT, D_IN)
        return made.double()

    plain = base()
    theirs = nn.Sequential(base())
    theirs[0].load_state_dict(plain.state_dict())
    model: Any = nn.Sequential(plain)
    [own] = adapt(model, LoraConfig(targets=("0",), init_rank=RANK, alpha=6.0, rslora=rslora))
    model.double()
    settings = {"fan_in_fan_out": kind is Conv1D, "use_rslora": rslora}
    config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["0"], **settings)
    wrapped = peft.get_peft_model(theirs, config).double()
    other = wrapped.base_model.model[0]
    with torch.no_grad():
        own.P.normal_()
        other.lora_A["default"].weight.copy_(own.Qt.T)
        other.lora_B["default"].weight.copy_(own.P)
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(TOKENS, D_OUT, dtype=torch.float64)
    y, expected = own(x), wrapped(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad((y * direction).sum(), [x, own.P, own.Qt])
    of_x, of_b, of_a = torch.autograd.grad(
        (expected * direction).sum(), [x, other.lora_B["default"].weight, other.lora_A["default"].weight]
    )
    for mine, their in zip(found, (of_x, of_b, of_a.T), strict=True):
        torch.testing.assert_close(mine, their, rtol=0, atol=1e-12)
    parts = {name: p.detach() for name, p in own.trained().items()} | {"adalora.lam": own.lam.detach()}
    [update] = Lora.updates({own.name: own.description()}, {own.name: own.held()}, None, parts.get)
    merged = update.merged(plain.weight.detach().clone())
    wrapped.merge_adapter()
    torch.testing.assert_close(merged, other.base_layer.weight, rtol=0, atol=1e-12)
