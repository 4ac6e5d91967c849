"""VeRA and DVoRA: PEFT's projections bit for bit, its function and gradients, and DoRA with VeRA's factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adalora_dist.artifacts.export import SavedAdapter, read_adapter, save_adapter
from adalora_dist.artifacts.formats import FORMATS, Options
from adalora_dist.config.methods import DvoraConfig, VeraConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.dvora import Dvora
from adalora_dist.methods.inject import adapt, parameter_groups
from adalora_dist.methods.vera import Vera, VeraLinear, projections
from tests.support.kept import kept_bytes
from tests.support.tiny_language_model import logits, tiny_gpt2

TOKENS, RANK = 31, 6


class Two(nn.Module):
    """Matrices of two shapes, so that each uses a part of the projections."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 9, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def two() -> Two:
    torch.manual_seed(0)
    return Two().double()


def adapted(kind: Any = VeraConfig, **changes: Any) -> Any:
    model = two()
    adapt(model, kind(targets=("up", "down"), init_rank=RANK, projection_seed=7, **changes))
    return model.double()


def learn(model: nn.Module) -> None:
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.uniform_(p, -0.1, 0.2)


def updates_of(model: nn.Module, method: Any = Vera) -> Any:
    layers = [m for m in model.modules() if isinstance(m, VeraLinear)]
    parts = {name: p.detach() for layer in layers for name, p in layer.trained().items()}
    return method.updates({layer.name: layer.description() for layer in layers}, {}, None, parts.get)


def test_it_is_pefts_vera() -> None:
    peft = pytest.importorskip("peft")
    own = adapted()
    config = peft.VeraConfig(r=RANK, target_modules=["up", "down"], projection_prng_key=7)
    model: Any = peft.get_peft_model(two(), config)
    a, b = own.up.shared.matrices
    assert torch.equal(model.base_model.vera_A["default"], a) and torch.equal(model.base_model.vera_B["default"], b)
    assert a.shape == (RANK, 20) and b.shape == (20, RANK)
    model.double()
    learn(own)
    layers = {name: getattr(model.base_model.model, name) for name in ("up", "down")}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.vera_lambda_d["default"].copy_(getattr(own, name).d)
            layer.vera_lambda_b["default"].copy_(getattr(own, name).b)
    x = torch.randn(TOKENS, 12, dtype=torch.float64, requires_grad=True)
    y, theirs = own(x), model(x)
    torch.testing.assert_close(y, theirs, rtol=0, atol=1e-12)
    vectors = [p for name in layers for p in (getattr(own, name).d, getattr(own, name).b)]
    others = [p["default"] for layer in layers.values() for p in (layer.vera_lambda_d, layer.vera_lambda_b)]
    found = torch.autograd.grad(y.square().sum(), [x, *vectors])
    for mine, their in zip(found, torch.autograd.grad(theirs.square().sum(), [x, *others]), strict=True):
        torch.testing.assert_close(mine, their, rtol=0, atol=1e-12)
    for update in updates_of(own):
        base = getattr(own, update.name).base.weight.detach()
        expected = base + layers[update.name].get_delta_weight("default")
        torch.testing.assert_close(update.merged(base.clone()), expected, rtol=0, atol=1e-12)


def test_dvora_is_dora_with_these_factors() -> None:
    own = adapted(DvoraConfig)
    x = torch.randn(TOKENS, 12, dtype=torch.float64)
    with torch.no_grad():
        own.up.d.uniform_()  # whatever d is
    torch.testing.assert_close(own(x), two()(x), rtol=0, atol=1e-14)
    learn(own)
    z = x
    for name in ("up", "down"):
        layer = getattr(own, name)
        a, b = (m.double() for m in layer.shared.matrices)
        v = layer.base.weight + torch.diag(layer.b) @ b[: layer.d_out] @ torch.diag(layer.d) @ a[:, : layer.d_in]
        lengths = layer.base.weight.norm(dim=1) + layer.dm
        w = lengths.unsqueeze(1) * v / v.norm(dim=1, keepdim=True)
        [update] = [u for u in updates_of(own, Dvora) if u.name == name]
        torch.testing.assert_close(update.merged(layer.base.weight.detach().clone()), w.detach(), rtol=0, atol=1e-12)
        z = z @ w.T if layer.base.bias is None else torch.tanh(z @ w.T + layer.base.bias)
    torch.testing.assert_close(own(x), z, rtol=0, atol=1e-12)
    with pytest.raises(UserError, match="PEFT has no form of method dvora: export the merged model"):
        FORMATS["peft"].write(SavedAdapter(updates_of(own, Dvora), "m", None, {}, {}), Path("p"), Options())


@pytest.mark.parametrize(
    ("rank", "shapes", "published"),
    [
        (1024, [(768, 768)] * 24, 43_008),
        (256, [(1024, 1024)] * 48, 61_440),
        (1024, [(1024, 1024)] * 48, 98_304),
        (1024, [(1280, 1280)] * 72, 165_888),
    ],
)
def test_published_counts(rank: int, shapes: list[tuple[int, int]], published: int) -> None:
    """VeRA on q and v of RoBERTa-base and -large, GPT-2 medium and large."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(d_in, d_out) for d_out, d_in in shapes))
    adapt(model, VeraConfig(targets=("all-linear",), init_rank=rank))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == published
    assert sum(layer.part_size for layer in model) == published


def test_vectors_are_not_decayed_and_projections_are_nobodys() -> None:
    for kind in (VeraConfig, DvoraConfig):
        model = adapted(kind)
        [group] = parameter_groups(model, kind(), 1e-2)
        assert group["weight_decay"] == 0
        assert not dict(model.named_buffers()) and model.up.shared is model.down.shared
    half = model.up.shared.like(torch.zeros(1, dtype=torch.bfloat16))[0]
    assert model.down.shared.like(half)[0] is half


def test_files_say_which_projections_they_need(tmp_path: Path) -> None:
    model = adapted()
    learn(model)
    save_adapter([*updates_of(model.float())], tmp_path, "m", None)
    described = (tmp_path / "adapter.json").read_text()
    assert '"method": "vera"' in described and (tmp_path / "adapter.safetensors").stat().st_size < 2000
    x = torch.randn(3, 12)
    [up, _] = read_adapter(tmp_path).adapters
    torch.testing.assert_close(
        up.merged(model.up.base.weight.detach().clone()) @ x.T, (model.up(x) - model.up.base.bias).T
    )
    digest = model.up.shared.digest()
    for wrong, said in (
        (described.replace('"seed": 7', '"seed": 8'), "draws other numbers from this seed"),
        (described.replace('"seed": 7', '"seed": "7"'), "settings must hold seed"),
        (described.replace(digest, "0"), "draws other numbers from this seed"),
        (described.replace('"method": "vera"', '"method": "verra"'), "there is no method 'verra'"),
        (described.replace('"format": 3', '"format": 4'), "format 4 is not 2 or 3"),
    ):
        assert wrong != described
        (tmp_path / "adapter.json").write_text(wrong)
        with pytest.raises(UserError, match=said):
            [up, _] = read_adapter(tmp_path).adapters
            up.merged(torch.zeros(20, 12))
    with pytest.raises(UserError, match="the random projections of VeRA"):
        _ = projections(0, 2, [(3, 4)], "0").matrices


@pytest.mark.parametrize("form", ["peft", "lora"])
def test_peft_loads_both_forms(form: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model: Any = tiny_gpt2()
    model.save_pretrained(tmp_path / "base")
    adapt(model, VeraConfig(init_rank=RANK, projection_seed=3))
    for module in model.modules():
        if isinstance(module, VeraLinear):
            nn.init.normal_(module.b, std=0.1)
            nn.init.normal_(module.d, std=0.3)
    saved = SavedAdapter(updates_of(model), str(tmp_path / "base"), None, {}, {})
    assert FORMATS[form].write(saved, tmp_path / form, Options()) == ""
    loaded = peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path / form)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_backward_are_r_numbers_per_token(dtype: torch.dtype) -> None:
    """The base is frozen and keeps nothing; no product of a vector and a projection, nor of a vector and A x."""
    layer = adapted().float().up
    layer.base.to(dtype)
    x = torch.randn(TOKENS, 12, dtype=dtype, requires_grad=True)
    layer(x)
    known = (*layer.parameters(), *layer.shared.like(x), x)
    assert kept_bytes(lambda: layer(x), known) == TOKENS * RANK * dtype.itemsize


@pytest.mark.parametrize("kind", [VeraConfig, DvoraConfig])
def test_gradients_are_those_of_autograd(kind: Any) -> None:
    """Of all that is trained, and of the input; and nothing is asked for where nothing needs it."""
    model = adapted(kind)
    learn(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(TOKENS, 12, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(model(x).square().sum(), [x, *trained])
    with pytest.MonkeyPatch.context() as patch:  # the form that is written out
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        expected = torch.autograd.grad(model(x).square().sum(), [x, *trained])
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)
    model.requires_grad_(False)
    [of_x] = torch.autograd.grad(model(x).square().sum(), [x])
    torch.testing.assert_close(of_x, found[0], rtol=0, atol=1e-12)
