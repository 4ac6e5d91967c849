"""AdaDoRA: DoRA's function over AdaLoRA's triplets, whose lengths outlive a selection; files at every matrix's rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from adalora_dist.artifacts.export import load_adapter, merge, read_adapter, save_adapter
from adalora_dist.artifacts.formats import FORMATS, Options
from adalora_dist.config.methods import AdaDoraConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adadora import AdaDora, AdaDoraLinear
from adalora_dist.methods.hooks import MethodHooks, attach
from adalora_dist.methods.inject import adapt, parameter_groups
from adalora_dist.methods.parameter_budget import within_budget
from adalora_dist.methods.protocol import adapters_of
from tests.support.expert_models import mixture
from tests.support.models import Net, global_batch
from tests.support.refusals import refusal
from tests.support.steps import make_steps
from tests.support.tiny_language_model import logits, tiny_llama

TOKENS, D_IN, D_OUT, RANK = 31, 24, 20, 4
STEPS = 10


def config(**changes: Any) -> AdaDoraConfig:
    values: dict[str, Any] = dict(
        init_rank=3, target_rank=1, alpha=6, targets=("up", "down"), initial_warmup_steps=1, final_steps=4,
        mask_interval_steps=2,
    )  # fmt: skip
    return AdaDoraConfig(**{**values, **changes})


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_function_and_its_gradients_are_those_of_the_formula(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    base: Any = nn.Linear(D_IN, D_OUT) if kind is nn.Linear else Conv1D(D_OUT, D_IN)
    nn.init.normal_(base.weight, std=0.3)
    model: Any = nn.Sequential(base)
    [own] = adapt(model, config(targets=("0",), init_rank=RANK), seed=5)
    assert isinstance(own, AdaDoraLinear)
    x, direction = torch.randn(TOKENS, D_IN).double(), torch.randn(TOKENS, D_OUT).double()
    model.double()
    torch.testing.assert_close(own(x), base(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        own.P.normal_()
        own.lam.uniform_(0.5, 1.5)
        own.dm.uniform_(-0.1, 0.1)
    parameters = [own.P, own.Qt, model.adalora.lam, own.dm]
    w0 = base.weight.detach() if kind is nn.Linear else base.weight.detach().T
    v = w0 + own.scale * (own.P * model.adalora.lam) @ own.Qt.T
    c = (w0.norm(dim=1) + own.dm) / v.norm(dim=1).detach()
    wanted = x @ (c.unsqueeze(1) * v).T + base.bias
    torch.testing.assert_close(own(x), wanted, rtol=0, atol=1e-12)
    found = torch.autograd.grad((own(x) * direction).sum(), parameters)
    expected = torch.autograd.grad((wanted * direction).sum(), parameters)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    parts = {name: p.detach() for name, p in own.trained().items()} | {"adalora.lam": model.adalora.lam.detach()}
    [update] = AdaDora.updates({"0": own.description()}, {"0": own.held()}, None, parts.get)
    merged = update.merged(base.weight.detach().clone())
    w = merged if kind is nn.Linear else merged.T
    torch.testing.assert_close(x @ w.T + base.bias, wanted, rtol=0, atol=1e-12)


def trained(section: AdaDoraConfig, bf16: bool = False) -> tuple[Any, MethodHooks, list[float]]:
    torch.manual_seed(0)
    model: Any = Net()
    adapt(model, section, seed=3)
    optimizer = torch.optim.AdamW(parameter_groups(model, section, 2e-2), lr=2e-2, weight_decay=0.1)
    hooks = attach(model, optimizer, section, STEPS)

    def loss_of(step: int) -> torch.Tensor:
        x, y = global_batch(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss: torch.Tensor = (model(x) - y).square().mean()
        return loss

    losses = make_steps(model, optimizer, hooks, loss_of, range(STEPS))
    hooks.finish()
    return model, hooks, losses


def test_lengths_outlive_their_triplets() -> None:
    """A matrix that loses all of them keeps m, and learns it; removed or held at 0, triplets make no difference."""
    few = dict(target_rank=0.75, target_budget=None)
    model, hooks, losses = trained(config(**few))
    kept, _, masked = trained(config(**few, compact=False))
    assert losses == pytest.approx(masked, rel=1e-5) and losses[-1] < losses[0]
    ranks = hooks.rank_pattern()
    assert sum(ranks.values()) == 3 and 0 in ranks.values()
    of_both = {layer.name: layer for layer in adapters_of(kept)}
    for layer in adapters_of(model):
        assert isinstance(layer, AdaDoraLinear) and layer.rank == ranks[layer.name]
        assert layer.dm.abs().min() > 0
        torch.testing.assert_close(layer.dm, of_both[layer.name].dm, rtol=1e-4, atol=1e-6)
    parameters = list(hooks.method_step.parameters())
    assert parameters[-4:] == [f"{layer.name}.dm" for layer in adapters_of(model)]
    assert parameters[-5] == "adalora.lam"
    x, _ = global_batch(0)
    found, plain = model(x), Net()
    plain.load_state_dict({name.replace(".base.", "."): p for name, p in model.state_dict().items()}, strict=False)
    for update in hooks.updates():
        module: Any = plain.get_submodule(update.name)
        assert update.rank == ranks[update.name]
        module.weight.data = update.merged(module.weight.data)
    torch.testing.assert_close(plain(x), found)


def test_a_matrix_without_triplets_learns_its_lengths_in_bf16_too() -> None:
    few = config(target_rank=0.75)
    _, hooks, losses = trained(few, bf16=True)
    assert 0 in hooks.rank_pattern().values()
    assert losses == pytest.approx(trained(few)[2], rel=0.02)


def test_vectors_are_not_decayed_and_p_may_learn_faster() -> None:
    model = Net()
    adapt(model, config(lora_plus_ratio=16))
    groups = parameter_groups(model, config(lora_plus_ratio=16), 1e-3)
    assert [(g["lr_ratio"], len(g["params"]), g.get("weight_decay")) for g in groups] == [
        (1, 5, None), (1, 4, 0.0), (16, 4, None),
    ]  # fmt: skip


def test_files_have_every_matrix_at_its_rank(tmp_path: Path) -> None:
    """Ranks 0, 1 and 2 side by side, in the adapter folder, in PEFT's DoRA, merged."""
    peft = pytest.importorskip("peft")
    model: Any = tiny_llama(40)
    model.save_pretrained(tmp_path / "base")
    section = config(init_rank=2, target_rank=0.75, targets=("q_proj", "v_proj", "up_proj"))
    adapt(model, section, seed=1)
    optimizer = torch.optim.AdamW(parameter_groups(model, section, 5e-2), lr=5e-2)
    hooks, tokens = attach(model, optimizer, section, STEPS), torch.arange(3, 15)[None]
    for _ in range(STEPS):
        model(input_ids=tokens, labels=tokens.flip(1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    updates, expected = hooks.updates(), logits(model)
    assert {0, 1} <= {update.rank for update in updates}
    save_adapter(updates, tmp_path / "adapter", str(tmp_path / "base"), None)
    saved = read_adapter(tmp_path / "adapter")
    assert [update.rank for update in saved.adapters] == list(hooks.rank_pattern().values())
    loaded: Any = tiny_llama(40)
    load_adapter(loaded, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=5e-5)
    merge(saved.adapters, tmp_path / "base", tmp_path / "merged", show_progress=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=5e-5)
    assert FORMATS["peft"].write(saved, tmp_path / "peft", Options()) == ""
    theirs = peft.PeftModel.from_pretrained(tiny_llama(40), tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=5e-5)


def test_counts_and_refusals() -> None:
    model = Net()
    num_triplet, num_lengths = 4 * (7 + 13 + 1), 2 * (7 + 13)  # of all four matrices
    fitted = within_budget(model, config().model_copy(update={"budget": str(num_lengths + 2 * num_triplet)}))
    assert (fitted.init_rank, fitted.target_budget) == (3, 8)
    with pytest.raises(UserError, match=r"method adadora has no init_from \(adalora and lora have\)"):
        AdaDoraConfig(init_from="folder")  # type: ignore[call-arg]
    assert "adalora and lora alone" in refusal(adapt, mixture("mixtral"), config(targets=("experts",)))
