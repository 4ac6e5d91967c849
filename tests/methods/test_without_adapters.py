"""``without_adapters``: the plain model for a while, and nothing of it reaches importance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adalora_dist.artifacts.adapted_model import adapt
from adalora_dist.config.methods import AdaLoraConfig, method_config
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adapter import without_adapters
from adalora_dist.methods.hooks import attach
from tests.support.expert_models import mixture
from tests.support.tiny_language_model import tiny_llama

IDS = torch.arange(3, 11).view(1, 8)
SETTINGS = AdaLoraConfig(init_rank=3, target_rank=2, initial_warmup_steps=2, final_steps=6)


def llama() -> Any:
    return tiny_llama(31, hidden_size=16)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.clone()


@pytest.mark.parametrize("make", [llama, lambda: mixture("mixtral")], ids=["llama", "mixtral"])
def test_the_plain_model_is_there_and_then_gone_again(make):
    model = make()
    plain = logits_of(model)
    adapt(model, SETTINGS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    adapted = logits_of(model)
    assert not torch.equal(adapted, plain)
    with without_adapters(model):
        assert torch.equal(logits_of(model), plain)
        with without_adapters(model):
            pass
        assert torch.equal(logits_of(model), plain)
    assert torch.equal(logits_of(model), adapted)


def test_a_reference_between_forward_and_backward_changes_nothing():
    def trained(with_reference: bool) -> tuple[dict[str, int], list[torch.Tensor]]:
        model = llama()
        adapt(model, SETTINGS, seed=1)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        hooks = attach(model, optimizer, SETTINGS, 12)
        for step in range(12):
            loss = model.train()(input_ids=IDS + step, labels=IDS + step).loss
            if with_reference:
                with without_adapters(model):
                    model(IDS)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        hooks.finish()
        return hooks.rank_pattern(), [p.detach().clone() for p in model.parameters() if p.requires_grad]

    (pattern, values), (other, others) = trained(False), trained(True)
    assert pattern == other and all(torch.equal(a, b) for a, b in zip(values, others, strict=True))


def test_what_cannot_be_switched_off_says_so():
    model = llama()
    with pytest.raises(UserError, match="no adapters to switch off"), without_adapters(model):
        pass
    adapt(model, method_config("dora", init_rank=2))
    with pytest.raises(UserError, match="a DoraLinear cannot be switched off"), without_adapters(model):
        pass
    model = llama()
    adapt(model, SETTINGS.model_copy(update={"train_modules": ("lm_head",)}))
    with pytest.raises(UserError, match="lm_head.weight is trained in full"), without_adapters(model):
        pass
    model = llama()
    adapt(model, SETTINGS)
    model.gradient_checkpointing_enable()
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    with pytest.raises(RuntimeError, match="go backward after it"), without_adapters(model):
        loss.backward()
