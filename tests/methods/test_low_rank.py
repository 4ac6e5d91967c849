"""Low-rank pre-training: the start is the best there is, and the product is what is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adalora_dist.artifacts.export import load_adapter, merge, save_adapter
from adalora_dist.config.methods import FactorisedConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt, parameter_groups
from adalora_dist.methods.protocol import others_trained
from tests.support import quantized_runs
from tests.support.quantized_runs import Case, write_llama
from tests.support.ranks import run_ranks
from tests.support.tiny_language_model import logits, tiny_gpt2, tiny_llama

CONFIG = FactorisedConfig(init_rank=5)


def test_the_start_is_the_best_approximation() -> None:
    model, plain = tiny_llama(40), tiny_llama(40)
    layers: Any = adapt(model, CONFIG)
    assert {layer.rank for layer in layers} == {5} and all(p.requires_grad for p in model.parameters())
    for layer in layers:
        weight = plain.get_submodule(layer.name).weight.detach()
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        torch.testing.assert_close(layer.B.detach() @ layer.At.detach().T, u[:, :5] * s[:5] @ vt[:5], atol=1e-4, rtol=0)
        torch.testing.assert_close(layer.B.norm(dim=0), layer.At.norm(dim=0))
    number = sum(p.numel() for layer in layers for p in layer.parameters())
    assert number == sum(5 * (layer.d_in + layer.d_out) for layer in layers)
    full = tiny_llama(40)
    adapt(full, FactorisedConfig(init_rank=999))  # all singular values there are
    torch.testing.assert_close(logits(full), logits(plain), atol=2e-3, rtol=0)


def exported(rank: int, world_size: int, folder: Path) -> None:
    model: Any = tiny_llama(40)
    model.save_pretrained(folder / "base")
    adapt(model, CONFIG)
    optimizer = torch.optim.AdamW(parameter_groups(model, CONFIG, 1e-2), lr=1e-2)
    hooks = attach(model, optimizer, CONFIG, 3)
    tokens = torch.arange(3, 15)[None]
    for _ in range(3):
        model(input_ids=tokens, labels=tokens.flip(1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = {name: p.detach() for name, p in others_trained(model)}
    merge(hooks.updates(), folder / "base", folder / "merged", trained=trained, show_progress=False)
    found = logits(AutoModelForCausalLM.from_pretrained(folder / "merged"))
    torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-4)
    save_adapter(hooks.updates(), folder / "adapter", str(folder / "base"), None, trained)
    loaded: Any = tiny_llama(40)
    load_adapter(loaded, folder / "adapter")
    loaded.load_state_dict(trained, strict=False)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


def test_what_is_exported_is_the_product(tmp_path: Path) -> None:
    run_ranks(1, exported, tmp_path)


def test_the_same_run_where_the_backbone_is_read_in_rows(tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    [expected] = run_ranks(1, quantized_runs.run, Case(method="none", adapter=CONFIG), folder)
    assert expected.losses[-1] < expected.losses[0]
    for found in run_ranks(2, quantized_runs.run, Case("fsdp2", "none", adapter=CONFIG), folder):
        assert found.losses == pytest.approx(expected.losses, rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3"])
def test_the_same_run_on_every_engine(engine: str, tmp_path: Path) -> None:
    folder = write_llama(tmp_path)
    [expected] = run_ranks(1, quantized_runs.run, Case(method="none", adapter=CONFIG), folder)
    for found in run_ranks(2, quantized_runs.run, Case(engine, "none", adapter=CONFIG), folder):
        assert found.losses == pytest.approx(expected.losses, rel=2e-5)


def test_biases_are_refused() -> None:
    with pytest.raises(UserError, match=r"method=low_rank: transformer.h.0.attn.c_attn has a bias"):
        adapt(tiny_gpt2(), CONFIG)
