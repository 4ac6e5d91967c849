"""Hydra: the formula, its gradients, what merges and what is plain LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adalora_dist.artifacts.export import SavedAdapter, read_adapter, save_adapter
from adalora_dist.artifacts.formats import FORMATS, Options
from adalora_dist.config.methods import HydraConfig
from adalora_dist.config.sections import ExportConfig, RunConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.hydra import Hydra, HydraLinear
from adalora_dist.methods.inject import adapt
from adalora_dist.training.backbone_checks import check_backbone
from tests.support.tiny_language_model import logits, tiny_gpt2, tiny_llama

TOKENS, D_IN, D_OUT = 31, 12, 20


def layer(bias: bool = True) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=bias)).double()
    adapt(model, HydraConfig(targets=("0",), init_rank=3, sequential_rank=5))
    return model[0].double()


def learn(model: nn.Module, std: float = 0.1) -> None:
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, HydraLinear):
            for p in (module.P, module.U):
                nn.init.normal_(p, std=std)


def updates_of(model: nn.Module) -> Any:
    layers = [m for m in model.modules() if isinstance(m, HydraLinear)]
    parts = {name: p.detach() for own in layers for name, p in own.trained().items()}
    return Hydra.updates({own.name: own.description() for own in layers}, {}, None, parts.get)


@pytest.mark.parametrize("bias", [True, False])
def test_formula_gradients_and_merge(bias: bool) -> None:
    """Against the formula with dense matrices: the gradient of what reads y0 goes through y0."""
    own, x = layer(bias), torch.randn(TOKENS, D_IN, dtype=torch.float64, requires_grad=True)
    assert torch.equal(own(x), own.base(x))
    assert sum(p.numel() for p in own.trained().values()) == 3 * (D_IN + D_OUT) + 5 * 2 * D_OUT == own.part_size
    learn(own)
    parts = [own.P, own.Qt, own.U, own.Vt]
    y0 = own.base(x)
    expected = y0 + x @ own.Qt @ own.P.T + y0 @ own.Vt @ own.U.T
    y = own(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    direction = torch.randn_like(y)
    found = torch.autograd.grad((y * direction).sum(), [x, *parts])
    for mine, theirs in zip(found, torch.autograd.grad((expected * direction).sum(), [x, *parts]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    [update] = updates_of(own)
    weight = update.merged(own.base.weight.detach().clone())
    bias_now = update.merged_bias(own.base.bias.detach()) if bias else None
    torch.testing.assert_close(nn.functional.linear(x, weight, bias_now), expected, rtol=0, atol=1e-12)


def test_without_a_bias_it_is_plain_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model: Any = tiny_llama(40)
    model.save_pretrained(tmp_path / "base")
    adapt(model, HydraConfig(init_rank=2, sequential_rank=3))
    learn(model, 0.05)
    saved = SavedAdapter(updates_of(model), str(tmp_path / "base"), None, {}, {})
    assert FORMATS["lora"].write(saved, tmp_path / "lora", Options()) == ""
    loaded = peft.PeftModel.from_pretrained(tiny_llama(40), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=5e-5)


def test_with_a_bias_it_is_not_and_says_so_before_training(tmp_path: Path) -> None:
    model: Any = tiny_gpt2()
    model.save_pretrained(tmp_path / "base")
    adapt(model, HydraConfig())
    saved = SavedAdapter(updates_of(model), str(tmp_path / "base"), None, {}, {})
    with pytest.raises(UserError, match="changes the bias of transformer.h.0.attn.c_attn"):
        FORMATS["lora"].write(saved, tmp_path / "lora", Options())
    from adalora_dist.backbones.names import FileNames

    model.file_names = FileNames.exactly({})
    run = RunConfig(adapter=HydraConfig(), export=ExportConfig(export_formats=("lora",)))
    with pytest.raises(UserError, match="export_formats lora: hydra's sequential branch changes the bias"):
        check_backbone(model, run)


def test_a_folder_says_how_its_ranks_are_split(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    adapt(model, HydraConfig(targets=("0",), init_rank=3, sequential_rank=5))
    save_adapter(updates_of(model), tmp_path, "m", None)
    [update] = read_adapter(tmp_path).adapters
    assert (update.rank, update.P.shape, update.V.shape) == (8, (D_OUT, 3), (5, D_OUT))
    described = (tmp_path / "adapter.json").read_text()
    for wrong in ("8", '"5"', "0"):
        (tmp_path / "adapter.json").write_text(described.replace('"sequential_rank": 5', f'"sequential_rank": {wrong}'))
        with pytest.raises(UserError, match="sequential_rank is .* must be an integer from 1 to 7"):
            read_adapter(tmp_path)


def test_the_published_count() -> None:
    """RoBERTa-base: ranks 4 and 8 on the feed-forward output of 12 layers."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(3072, 768) for _ in range(12)))
    adapt(model, HydraConfig(init_rank=4, sequential_rank=8))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 331_776
