"""``convert_peft``: what PEFT has put into a model becomes adapters of this project's that compute the same."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from adalora_dist.artifacts.adapted_model import adapt
from adalora_dist.artifacts.peft_model import convert_peft
from adalora_dist.config.methods import AdaLoraConfig, LoraConfig, method_config
from adalora_dist.io.errors import UserError
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.protocol import adapters_of
from tests.support.tiny_language_model import tiny_gpt2, tiny_llama

IDS = torch.arange(3, 11).view(1, 8)
NUM_MATRICES = 14


def llama() -> Any:
    return tiny_llama(31, hidden_size=16)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.clone()


def trained_by_peft(model: Any, peft_config: Any) -> Any:
    """With factors as training might have left them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft_config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **fields})


def adalora(**fields: Any) -> Any:
    ranks = {"init_r": 3, "target_r": 2, "tinit": 2, "tfinal": 6, "total_step": 20}
    return peft.AdaLoraConfig(**{**ranks, "target_modules": "all-linear", **fields})


KINDS = {
    "lora": (lora(), {"target_rank": 2}),
    "rslora, above its rank": (lora(use_rslora=True), {"target_rank": 4, "init_rank": 6}),
    "lora in singular values": (lora(), {"target_rank": 2, "start": "paper"}),
    "ranks and alphas of their own": (
        lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, exclude_modules=["o_proj"], bias="none"),
        {"target_budget": 9},
    ),
    "some layers": (lora(target_modules=["q_proj", "down_proj"], layers_to_transform=[1]), {"target_rank": 2}),
    "adalora": (adalora(), {}),
    "adalora that goes on as lora does": (adalora(), {"start": "matched"}),
}


@pytest.mark.filterwarnings("ignore:peft_config. not honoured")
@pytest.mark.parametrize(
    ("kind", "make"), [*((kind, llama) for kind in KINDS), ("lora", tiny_gpt2), ("adalora", tiny_gpt2)]
)
def test_the_function_stays(kind, make):
    peft_config, settings = copy.deepcopy(KINDS[kind])  # PEFT writes the modules' names into it
    plain = make()
    theirs = trained_by_peft(plain, peft_config)
    names = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    expected = logits_of(theirs)
    model, config = convert_peft(theirs, **settings)
    assert model is plain and {adapter.name for adapter in adapters_of(model)} == names == set(config.targets)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=5e-5)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"P", "Qt", "lam"}


def test_weights_are_kept_exactly():
    theirs = trained_by_peft(llama(), lora())
    layer = theirs.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    a, b = layer.lora_A["default"].weight.clone(), layer.lora_B["default"].weight.clone()
    model, config = convert_peft(theirs, target_rank=2)
    ours = model.get_submodule("model.layers.1.mlp.up_proj")
    assert torch.equal(ours.Qt.T, a) and torch.equal(ours.P, b) and bool((ours.lam == 1).all())
    assert ours.scale == layer.scaling["default"] == config.scale and ours.base is layer.base_layer

    theirs = trained_by_peft(llama(), adalora(lora_alpha=5))
    layer = theirs.get_submodule("base_model.model.model.layers.0.self_attn.v_proj")
    kept = [getattr(layer, name)["default"].clone() for name in ("lora_A", "lora_B", "lora_E")]
    with pytest.warns(UserWarning, match="total_step"):
        model, _ = convert_peft(theirs)
    ours = model.get_submodule("model.layers.0.self_attn.v_proj")
    assert torch.equal(ours.Qt.T, kept[0]) and torch.equal(ours.P, kept[1])
    torch.testing.assert_close(ours.lam * ours.scale, kept[2].flatten() * 5 / (3 + 1e-5))


def test_what_is_trained_in_full_and_adapters_without_a_wrapper(tmp_path):
    llama().save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    plain.config.pad_token_id = 0
    theirs = trained_by_peft(plain, lora(task_type="SEQ_CLS", target_modules=["q_proj"]))
    expected = logits_of(theirs)
    model, config = convert_peft(theirs, target_rank=2)
    assert config.train_modules == ("score",) and model.score.weight.requires_grad
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=5e-5)

    injected = peft.inject_adapter_in_model(lora(), llama())
    with torch.no_grad():
        for name, parameter in injected.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    expected = logits_of(injected)
    settings = method_config("lora", init_rank=4, alpha=6)
    model, config = convert_peft(injected, settings)
    assert model is injected and config is settings and not hasattr(model, "peft_config")
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=5e-5)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again), expected, rtol=1e-5, atol=5e-5)


def test_who_takes_plain_models_names_the_way():
    theirs = trained_by_peft(llama(), lora())
    config = AdaLoraConfig(init_rank=4)
    with pytest.raises(UserError, match="has PEFT's adapters: convert_peft"):
        adapt(theirs, config)
    with pytest.raises(UserError, match=r"call convert_peft\(model\), as it has PEFT's before attach"):
        attach(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), config, 20)


def test_the_wrapper_says_nothing_any_more():
    theirs = trained_by_peft(llama(), lora())
    convert_peft(theirs, target_rank=2)
    for use in (theirs.disable_adapter, theirs.merge_and_unload, lambda: theirs.save_pretrained("x")):
        with pytest.raises(UserError, match="was converted: use the model that convert_peft gave back"):
            use()


def two_adapters() -> Any:
    model = trained_by_peft(llama(), lora())
    model.add_adapter("ref", lora())
    return model


def merged() -> Any:
    model = trained_by_peft(llama(), lora())
    model.merge_adapter()
    return model


def both() -> Any:
    model = llama()
    adapt(model, AdaLoraConfig(targets=("q_proj",)))
    model.peft_config = {"default": lora()}
    return model


def of(peft_config: Any) -> Any:
    return lambda: trained_by_peft(llama(), peft_config)


BUDGET = {"target_rank": 2}
REFUSED = {
    "no adapter": (llama, BUDGET, "has no adapters of PEFT's"),
    "two": (two_adapters, BUDGET, r"2 adapters of PEFT's \(default, ref\)"),
    "merged": (merged, BUDGET, "is merged into"),
    "besides ours": (both, BUDGET, "besides those of adapt: leave peft_config out"),
    "no budget": (of(lora()), {}, "a LoraConfig: for LoRA write .*a budget below its r"),
    "dora": (of(lora(use_dora=True)), BUDGET, "is DoRA"),
    "another base": (of(lora(init_lora_weights="pissa")), BUDGET, "init_lora_weights='pissa'.*a changed base"),
    "another kind": (of(peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])), BUDGET, "type 'IA3'"),
    "embeddings": (of(lora(target_modules=["embed_tokens"])), BUDGET, "embed_tokens is a Embedding"),
    "biases": (of(lora(bias="all")), BUDGET, "bias='all'"),
    "tokens": (of(lora(trainable_token_indices=[1])), BUDGET, "trainable_token_indices="),
    "rank": (of(lora()), {"config": AdaLoraConfig(init_rank=3)}, "has rank 4, and init_rank is 3"),
    "more": (of(lora(target_modules=["q_proj"])), {"config": AdaLoraConfig()}, "12 matrices .* PEFT has not adapted"),
    "fewer": (of(lora()), {"config": AdaLoraConfig(targets=("q_proj",))}, "12 matrices .* not among the targets"),
    "head": (
        of(lora(modules_to_save=["lm_head"])), {"config": AdaLoraConfig()}, "lm_head is in PEFT's modules_to_save",
    ),
    "method": (of(lora()), {"config": method_config("dora", init_rank=4)}, "method dora has no triplets"),
    "both given": (of(lora()), {"config": LoraConfig(init_rank=4), **BUDGET}, "config and target_rank=2"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_adapter_is_refused_and_left_alone(case):
    make, settings, words = REFUSED[case]
    model = make()
    before = logits_of(model)
    with pytest.raises(UserError, match=words) as error:
        convert_peft(model, **settings)
    assert "\n" not in str(error.value) and torch.equal(logits_of(model), before)
