"""Experts beyond the nine architectures: other classes, one expert, one choice, other kernels, checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from adalora_dist import adapt
from adalora_dist.backbones.experts import stacks_of
from tests.support.expert_models import SIZES, loss_of, mixture
from tests.support.expert_steps import expert_layers, looped_loss, moved
from tests.support.expert_training import FALLING, config, run
from tests.support.model_sweep import CHANGES
from tests.support.tiny_any import CannotBeTiny, tiny_model


def mixtral(num_experts: int, top_k: int):
    torch.manual_seed(0)
    sizes = dict(intermediate_size=24, num_local_experts=num_experts, num_experts_per_tok=top_k)
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES | sizes, router_aux_loss_coef=0.0))
    model.config.use_cache = False
    return model


def check(model, atol):
    """Adapters change nothing at the start; away from it, loss and gradients are those of the loop over experts."""
    model.set_experts_implementation("eager")
    model = model.double().eval()
    plain, before = copy.deepcopy(model), loss_of(model)
    layers = expert_layers(adapt(model, config(targets=("experts",))))
    assert len(layers) == len(stacks_of(plain)) and (loss_of(model) - before).abs() < atol
    for layer in layers:
        layer.double()
    model.adalora.double()
    moved(model, layers)
    found = loss_of(model)
    found.backward()
    factors = {
        layer.name: tuple(x.detach().clone().requires_grad_() for x in (layer.P, layer.lam, layer.Qt))
        for layer in layers
    }
    expected = looped_loss(plain, layers, factors)
    expected.backward()
    assert (found - expected).abs() < atol
    for layer in layers:
        for own, wanted in zip((layer.P, layer.Qt), factors[layer.name][::2], strict=True):
            torch.testing.assert_close(own.grad, wanted.grad, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (3, 3)])
def test_one_expert_one_choice_and_all_of_them(num_experts, top_k):
    check(mixtral(num_experts, top_k), atol=1e-12)
    _, hooks, _ = run(mixtral(num_experts, top_k), config(**FALLING))
    assert sum(hooks.rank_pattern().values()) == round(1.5 * len(hooks.rank_pattern()))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_every_kernel_and_checkpointing_give_the_same(kind):
    """Adapted experts are computed grouped; what was set for the model's own changes nothing."""
    losses, gradients = [], []
    for implementation in ("eager", "grouped_mm", "batched_mm", "checkpointed"):
        model = mixture(kind)
        if implementation == "checkpointed":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.set_experts_implementation(implementation)
        layers = expert_layers(adapt(model, config(targets=("experts",))))
        moved(model, layers)
        model.train()
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.item())
        gradients.append([layer.P.grad for layer in layers])
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_columns_of_unequal_ranks_find_their_places_in_one_graph():
    """Compiled as it runs: the spreading of ragged columns breaks no graph where the model's own products do not."""
    model = mixture("mixtral")
    adapters, _, _ = run(model, config(**FALLING, targets=("experts",)))
    assert any(len(set(layer.ranks)) > 1 for layer in expert_layers(adapters))
    ids = torch.arange(3, 19).view(1, -1)
    model.set_experts_implementation("grouped_mm")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_every_class_of_transformers_that_has_stacks():
    """All that can be made tiny; some route in float32 whatever they compute in, which is rounding."""
    seen, untried = [], []
    names = {
        n
        for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for n in ([entry] if isinstance(entry, str) else entry)
    }
    for name in sorted(names & set(dir(tf))):
        changes = next((value for start, value in CHANGES.items() if name.startswith(start)), {})
        try:
            model = tiny_model(getattr(tf, name), **changes)
            if not stacks_of(model):
                continue
            ids = torch.randint(3, 32, (2, 12))
            model.eval()(input_ids=ids)
        except (CannotBeTiny, RuntimeError, ValueError, TypeError, AttributeError, KeyError):
            untried.append(name)
            continue
        with torch.no_grad():
            for parameter in (p for n, p in model.named_parameters() if ".experts." in n or n.endswith("gate.weight")):
                parameter.normal_(std=0.3)
        check(model, atol=1e-6)
        seen.append(name)
    assert len(seen) > 40, (seen, untried)
