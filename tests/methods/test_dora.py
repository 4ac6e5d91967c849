"""DoRA: the function, gradients and merge of PEFT's layer, from norms that need no product and no open base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from adalora_dist.backbones.quantization import dequantized, settle_quantized
from adalora_dist.config.methods import DoraConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.dora import Dora, DoraLinear
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt, parameter_groups

TOKENS, D_IN, D_OUT, RANK = 31, 24, 20, 4


def bases() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    conv = Conv1D(D_OUT, D_IN)
    nn.init.normal_(conv.weight, std=0.3)
    nn.init.normal_(conv.bias)
    return {"linear": nn.Linear(D_IN, D_OUT), "no bias": nn.Linear(D_IN, D_OUT, bias=False), "conv1d": conv}


def layer(base: nn.Module, learnt: bool = True, **changes: Any) -> Any:
    model = nn.Sequential(base)
    adapt(model, DoraConfig(targets=("0",), init_rank=RANK, alpha=6, **changes), seed=5)
    if learnt:
        with torch.no_grad():
            model[0].P.normal_()
            model[0].dm.uniform_(-0.1, 0.1)
    return model[0]


def weight_of(base: Any) -> torch.Tensor:
    return base.weight.T if isinstance(base, Conv1D) else base.weight


@pytest.mark.parametrize("kind", bases())
def test_it_is_pefts_dora(kind: str) -> None:
    """Float64: outputs, every gradient, the merged weight."""
    peft = pytest.importorskip("peft")
    own = layer(bases()[kind].double()).double()
    theirs = nn.Sequential(bases()[kind].double())
    options: dict[str, Any] = {"fan_in_fan_out": kind == "conv1d"}
    config = peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["0"], use_dora=True, **options)
    model: Any = peft.get_peft_model(theirs, config).double()
    other = model.base_model.model[0]
    lengths = weight_of(own.base).norm(dim=1)
    magnitude = other.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude.detach(), lengths.detach(), rtol=0, atol=1e-6)  # PEFT makes it in float32
    with torch.no_grad():
        other.lora_A["default"].weight.copy_(own.Qt.T)
        other.lora_B["default"].weight.copy_(own.P)
        magnitude.copy_(lengths + own.dm)
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(TOKENS, D_OUT, dtype=torch.float64)
    y, theirs_y = own(x), model(x)
    torch.testing.assert_close(y, theirs_y, rtol=0, atol=1e-12)
    found = torch.autograd.grad((y * direction).sum(), [x, own.P, own.Qt, own.dm])
    wanted = torch.autograd.grad(
        (theirs_y * direction).sum(),
        [x, other.lora_B["default"].weight, other.lora_A["default"].weight, magnitude],
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.T if a.shape != b.shape else b, rtol=0, atol=1e-12)
    parts = {f"{own.name}.{kind}": p.detach() for kind, p in own.named_parameters(recurse=False)}
    [update] = Dora.updates({own.name: own.description()}, {}, None, parts.get)
    merged = update.merged(own.base.weight.detach().clone())
    model.merge_adapter()
    torch.testing.assert_close(merged, other.base_layer.weight, rtol=0, atol=1e-12)


def test_the_start_is_the_plain_model_bit_for_bit() -> None:
    for base in bases().values():
        own, x = layer(base, learnt=False), torch.randn(2, 5, D_IN)
        assert torch.equal(own(x), base(x)) and own(x).shape == (2, 5, D_OUT)


def test_dropout_is_on_what_changes() -> None:
    """W0 sees the whole input, W A and c - 1 the one with dropout, as in the authors' code."""
    own = layer(nn.Linear(D_IN, D_OUT), dropout=0.5).double()
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64)
    torch.manual_seed(3)
    y = own(x)
    torch.manual_seed(3)
    dropped = own.dropout(x)
    v = own.base.weight + own.scale * own.P @ own.Qt.T
    lengths = own.base.weight.norm(dim=1)
    w = (lengths + own.dm).unsqueeze(1) * v / v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(y, own.base(x) + dropped @ (w - own.base.weight).T, rtol=0, atol=1e-12)


def test_rows_of_zeros_stay_finite_and_learn_what_is_added() -> None:
    base = nn.Linear(D_IN, D_OUT)
    with torch.no_grad():
        base.weight[[2, 7]] = 0
    own = layer(base, learnt=False)
    x = torch.randn(TOKENS, D_IN)
    own(x).sum().backward()
    assert torch.equal(own(x), base(x)) and own.num_zero_rows == 2
    assert own.dm.grad[[2, 7]].eq(0).all() and own.dm.grad.abs().gt(0).sum() == D_OUT - 2
    assert own.P.grad.isfinite().all() and own.P.grad[[2, 7]].abs().gt(0).all()
    with torch.no_grad():
        own.P.normal_()
    added = own.scale * own.P @ own.Qt.T
    torch.testing.assert_close(own(x)[:, 2], x @ added[2] + base.bias[2])
    parts = {f"0.{kind}": p.detach() for kind, p in own.named_parameters(recurse=False)}
    [update] = Dora.updates({"0": own.description()}, {}, None, parts.get)
    merged = update.merged(base.weight.detach().clone())
    torch.testing.assert_close(x @ merged.T + base.bias, own(x), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- when they are made


class Counted(nn.Linear):
    rows: list[int]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(x))
        return super().forward(x)


def counted() -> tuple[nn.Sequential, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(Counted(D_IN, D_OUT))
    model[0].rows = []
    adapt(model, DoraConfig(targets=("0",), init_rank=RANK))
    own: Any = model[0]
    own.base.rows.clear()  # of what asked whether it is a linear map
    return model, own


def test_norms_are_made_once_per_step_in_the_same_call_of_the_base() -> None:
    model, own = counted()
    config = DoraConfig(targets=("0",), init_rank=RANK)
    optimizer = torch.optim.AdamW(parameter_groups(model, config, 1e-1), lr=1e-1)
    attach(model, optimizer, config, 3).detach()
    x, calls = torch.randn(TOKENS, D_IN), list[int]()
    own.base.register_forward_hook(lambda *_: calls.append(1))  # an engine gathers for each
    for _ in range(2):
        for _ in range(3):  # micro-batches
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert own.base.rows == [RANK, TOKENS, TOKENS, TOKENS] * 2 and len(calls) == 6
    v = own.base.weight + own.scale * own.P @ own.Qt.T
    expected = (own.base.weight.norm(dim=1) + own.dm) / v.norm(dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(x), x @ (expected.unsqueeze(1) * v).T + own.base.bias)
    assert own.base.rows[-2:] == [RANK, TOKENS]


def test_without_hooks_norms_follow_the_weights_all_the_same() -> None:
    model, own = counted()
    x = torch.randn(TOKENS, D_IN)
    own.eval()
    first = model(x)
    assert torch.equal(model(x), first) and own.base.rows == [RANK, TOKENS, TOKENS]
    with torch.no_grad():
        own.P.normal_()
    changed = model(x)
    own.train()
    torch.testing.assert_close(model(x), changed)
    assert own.base.rows[3:] == [RANK, TOKENS] * 2


def test_under_gradient_checkpointing() -> None:
    model, own = counted()
    config = DoraConfig(targets=("0",), init_rank=RANK)
    attach(model, torch.optim.AdamW(parameter_groups(model, config, 1e-1)), config, 3).detach()
    with torch.no_grad():
        own.P.normal_()
    x = torch.randn(TOKENS, D_IN, requires_grad=True)
    wanted = torch.autograd.grad(model(x).square().sum(), list(own.trained().values()))
    own.release()
    y: Any = checkpoint(model, x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(y.square().sum(), list(own.trained().values())), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_lengths_are_not_decayed_and_counted() -> None:
    model, own = counted()
    decayed, lengths = parameter_groups(model, DoraConfig(targets=("0",)), 1e-3)
    assert lengths["params"] == [own.dm] and lengths["weight_decay"] == 0 and len(decayed["params"]) == 2
    assert own.part_size == RANK * (D_IN + D_OUT) + D_OUT


# --------------------------------------------------------------------------------------- bases, files and refusals


def quantised(kind: str, bias: bool = True) -> tuple[nn.Module, torch.Tensor]:
    bnb: Any = pytest.importorskip("bitsandbytes").nn
    torch.manual_seed(0)
    plain = nn.Linear(128, 64, bias=bias)
    base = bnb.Linear4bit(128, 64, bias=bias, compute_dtype=torch.float32, quant_type=kind)
    base.load_state_dict(plain.state_dict())
    model = nn.Sequential(base.to("cpu"))
    settle_quantized(model)
    return model, dequantized(base).float()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_over_4_bit_weights_lengths_are_those_of_what_they_stand_for(kind: str) -> None:
    model, weight = quantised(kind)
    adapt(model, DoraConfig(targets=("0",), init_rank=RANK))
    own: Any = model[0]
    x = torch.randn(TOKENS, 128)
    torch.testing.assert_close(own(x), own.base(x), rtol=0, atol=1e-6)
    with torch.no_grad():
        own.P.normal_()
        own.dm.uniform_(-0.1, 0.1)
    v = weight + own.scale * own.P @ own.Qt.T
    merged = (weight.norm(dim=1) + own.dm).unsqueeze(1) * v / v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(own(x), x @ merged.T + own.base.bias, rtol=1e-4, atol=1e-4)


def test_half_precision_loses_nothing_where_nothing_was_learnt() -> None:
    own = layer(nn.Linear(D_IN, D_OUT).bfloat16(), learnt=False)
    x = torch.randn(TOKENS, D_IN, dtype=torch.bfloat16)
    assert torch.equal(own(x), own.base(x))
    with torch.no_grad():
        own.P.normal_(std=0.1)
    v = own.base.weight.float() + own.scale * own.P @ own.Qt.T
    own.eval()
    own(x)
    torch.testing.assert_close(own._norms, v.norm(dim=1), rtol=2e-3, atol=0)


def test_what_cannot_be_read_is_refused() -> None:
    class Packed(nn.Module):
        in_features, out_features = 8, 8
        weight = torch.zeros(8, 8, dtype=torch.uint8)

    with pytest.raises(UserError, match="targets: 0 is a Packed, whose rows have no lengths that can be read"):
        DoraLinear(Packed(), "0", 2, 1.0)


def test_peft_loads_its_own_form(tmp_path: Path) -> None:
    """Of a model with Conv1D and biases, and of rows that are 0."""
    peft = pytest.importorskip("peft")
    from adalora_dist.artifacts.export import SavedAdapter
    from adalora_dist.artifacts.formats import FORMATS, Options
    from tests.support.tiny_language_model import logits, tiny_gpt2

    model: Any = tiny_gpt2()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[:, 3] = 0
    model.save_pretrained(tmp_path / "base")
    adapt(model, DoraConfig(init_rank=3, alpha=6))
    for module in model.modules():
        if isinstance(module, DoraLinear):
            nn.init.normal_(module.P, std=0.3)
            nn.init.uniform_(module.dm, -0.1, 0.1)
    described = {m.name: m.description() for m in model.modules() if isinstance(m, DoraLinear)}
    parts = {n: p.detach() for m in model.modules() if isinstance(m, DoraLinear) for n, p in m.trained().items()}
    saved = SavedAdapter(Dora.updates(described, {}, None, parts.get), str(tmp_path / "base"), None, {}, {})
    assert FORMATS["peft"].write(saved, tmp_path / "peft", Options()) == ""
    plain = tiny_gpt2()
    plain.load_state_dict(type(plain).from_pretrained(tmp_path / "base").state_dict())
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "peft")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=2e-5)
    with pytest.raises(UserError, match=r"is of full rank, no plain LoRA"):
        FORMATS["lora"].write(saved, tmp_path / "lora", Options())
    nothing = Dora.updates(described, {}, None, lambda name: torch.zeros_like(parts[name]) if name in parts else None)
    with pytest.raises(UserError, match="rows that are 0 with and without the adapter, of which PEFT makes nan"):
        FORMATS["peft"].write(SavedAdapter(nothing, str(tmp_path / "base"), None, {}, {}), tmp_path / "p", Options())
