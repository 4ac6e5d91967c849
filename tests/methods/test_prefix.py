"""Prefix tuning: PEFT's logits for the same numbers, generation, files, and models that it does not serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from adalora_dist.artifacts.export import SavedAdapter, load_adapter, merge, read_adapter, save_adapter
from adalora_dist.artifacts.formats import FORMATS, Options
from adalora_dist.config.methods import LoraConfig, PrefixConfig
from adalora_dist.config.sections import ExportConfig, RunConfig, TrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt, parameter_groups
from adalora_dist.methods.prefix import Prefix, PrefixTuning
from adalora_dist.methods.protocol import adapters_of
from tests.support.quantized_runs import Case, write_llama
from tests.support.quantized_runs import run as run_from_files
from tests.support.ranks import run_ranks
from tests.support.refusals import refusal
from tests.support.tiny_language_model import logits, tiny_gpt2, tiny_llama

MODELS = {"gpt2": tiny_gpt2, "llama": lambda: tiny_llama(40)}
LENGTH = 3


def with_prefix(kind: str) -> Any:
    model: Any = MODELS[kind]()
    adapt(model, PrefixConfig(prefix_length=LENGTH, prefix_init="normal"), seed=3)
    return model


def updates_of(model: Any) -> Any:
    [layer] = adapters_of(model)
    parts = {name: p.detach() for name, p in layer.trained().items()}
    return PrefixTuning.updates({layer.name: layer.description()}, {}, None, parts.get)


def of_peft(kind: str, prefix: torch.Tensor | None, **changes: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, **changes)
    model = peft.get_peft_model(MODELS[kind](), config)
    if prefix is not None:
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.copy_(prefix)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_logits_gradients_and_losses_are_pefts(kind: str) -> None:
    """A padded batch, so that the mask is longer, too; there is no loss of the prefix."""
    own = with_prefix(kind).double()
    [layer] = adapters_of(own)
    assert isinstance(layer, Prefix) and layer.embedding.shape == (LENGTH, layer.heads.width)
    theirs = of_peft(kind, layer.embedding.detach().float()).double()
    tokens, mask = torch.arange(3, 11).view(2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    mine, expected = own(**batch), theirs(**batch)
    assert mine.logits.shape == (2, 4, 40)
    torch.testing.assert_close(mine.logits[mask == 1], expected.logits[mask == 1], rtol=0, atol=1e-12)
    torch.testing.assert_close(mine.loss, expected.loss, rtol=0, atol=1e-12)
    [found] = torch.autograd.grad(mine.loss, [layer.embedding])
    [other] = torch.autograd.grad(expected.loss, [theirs.prompt_encoder["default"].embedding.weight])
    torch.testing.assert_close(found, other, rtol=0, atol=1e-12)
    assert found.abs().max() > 0
    plain = MODELS[kind]().double()
    assert (plain(input_ids=tokens).logits - own(input_ids=tokens).logits).abs().max() > 0.01


@pytest.mark.parametrize("kind", MODELS)
def test_an_mlp_makes_what_pefts_makes(kind: str, tmp_path: Path) -> None:
    """Logits and gradients of all its parameters in float64; what it has made is PEFT's form without one."""
    peft = pytest.importorskip("peft")
    own: Any = MODELS[kind]()
    config = PrefixConfig(prefix_length=LENGTH, prefix_hidden_size=6)
    [layer] = adapt(own, config, seed=3)
    parts, others = dict(layer.named_parameters(recurse=False)), parameter_groups(own, config, 1e-3)
    assert PrefixTuning(config).sizes(MODELS[kind]()).count(LENGTH) == sum(p.numel() for p in parts.values())
    assert [len(group["params"]) for group in others] == [3, 2] and others[1]["weight_decay"] == 0
    updates, tokens = updates_of(own), torch.arange(3, 11).view(2, 4)
    theirs = of_peft(kind, None, prefix_projection=True, encoder_hidden_size=6)
    encoder = theirs.prompt_encoder["default"]
    inner, _, outer = encoder.transform
    of_peft_s = [encoder.embedding.weight, inner.weight, outer.weight, inner.bias, outer.bias]
    with torch.no_grad():
        for parameter, value in zip(of_peft_s, parts.values(), strict=True):
            parameter.copy_(value)
    own.double(), theirs.double()
    mine, expected = (model(input_ids=tokens, labels=tokens) for model in (own, theirs))
    torch.testing.assert_close(mine.logits, expected.logits, rtol=0, atol=1e-12)
    found = torch.autograd.grad(mine.loss, list(parts.values()))
    torch.testing.assert_close(found, torch.autograd.grad(expected.loss, of_peft_s), rtol=0, atol=1e-12)
    assert all(gradient.abs().max() > 0 for gradient in found)
    MODELS[kind]().save_pretrained(tmp_path / "base")
    saved = SavedAdapter(updates, str(tmp_path / "base"), None, {}, {})
    FORMATS["peft"].write(saved, tmp_path / "peft", Options())
    loaded = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path / "peft")
    torch.testing.assert_close(logits(loaded), logits(own.float()), rtol=0, atol=5e-5)


def test_equal_positions_are_refused() -> None:
    with pytest.raises(UserError, match="prefix_init zero with prefix_hidden_size 4: all positions would start"):
        PrefixConfig(prefix_hidden_size=4, prefix_init="zero")
    assert PrefixConfig.resolved(PrefixConfig().model_dump())["prefix_init"] == "zero"


@pytest.mark.parametrize("kind", MODELS)
def test_generation_goes_on_behind_the_prefix(kind: str) -> None:
    """With the growing cache, what a whole forward of each longer text says; prompts of two lengths, padded left."""
    model = with_prefix(kind)
    prompts, mask = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    made = model.generate(input_ids=prompts, attention_mask=mask, **options)
    for row, length in ((0, 2), (1, 3)):
        text = prompts[row, -length:][None]
        for _ in range(5):
            text = torch.cat((text, model(input_ids=text).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
        assert torch.equal(made[row, -length - 5 :], text[0])


@pytest.mark.parametrize("kind", MODELS)
def test_values_have_the_type_that_the_backbone_computes_in(kind: str) -> None:
    """Under autocast; and where FSDP2 casts what it gathers, while it still has the embeddings sharded, in float32."""
    model, tokens = with_prefix(kind), torch.arange(3, 7)[None]
    [layer] = adapters_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=tokens, labels=tokens)
    assert {x.values.dtype for x in output.past_key_values.layers} == {torch.bfloat16}
    output.loss.backward()
    assert layer.embedding.grad.dtype == torch.float32 and layer.embedding.grad.abs().max() > 0
    assert layer.bfloat16()(1, torch.float32)[0][0].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", MODELS)
def test_files(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = with_prefix(kind)
    plain: Any = MODELS[kind]()
    plain.save_pretrained(tmp_path / "base")
    expected, base = logits(model), str(tmp_path / "base")
    save_adapter(updates_of(model), tmp_path / "adapter", base, None)
    loaded: Any = MODELS[kind]()
    load_adapter(loaded, tmp_path / "adapter")
    assert torch.equal(logits(loaded), expected)
    assert "the model already has a prefix" in refusal(lambda: load_adapter(loaded, tmp_path / "adapter"))
    saved = read_adapter(tmp_path / "adapter")
    assert FORMATS["peft"].write(saved, tmp_path / "peft", Options()) == ""
    theirs = peft.PeftModel.from_pretrained(MODELS[kind](), tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=5e-5)
    assert "cannot be merged" in refusal(lambda: merge(saved.adapters, Path(base), tmp_path / "merged"))
    besides = SavedAdapter(saved.adapters, base, None, {"lm_head.weight": torch.zeros(2)}, {})
    assert "cannot hold lm_head.weight" in refusal(lambda: FORMATS["peft"].write(besides, tmp_path / "no", Options()))
    file = tmp_path / "adapter/adapter.json"
    file.write_text(file.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    assert "positions of" in refusal(lambda: read_adapter(tmp_path / "adapter"))


@pytest.mark.slow
@pytest.mark.parametrize("text", [None, "a b c d"], ids=["zero", "text"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_over_a_backbone_from_files(quantization: str, text: str | None, tmp_path: Path) -> None:
    if quantization != "none":
        pytest.importorskip("bitsandbytes")
    adapter, folder = PrefixConfig(prefix_length=LENGTH, prefix_text=text), write_llama(tmp_path)
    [expected] = run_ranks(1, run_from_files, Case(method=quantization, adapter=adapter), folder)
    assert expected.losses[-1] < expected.losses[0]
    for engine in ("ddp", "fsdp2", "zero2", "zero3"):
        case = Case(engine, quantization, adapter=adapter, evaluate_first=engine != "zero2")
        for found in run_ranks(2, run_from_files, case, folder):
            assert found.losses == pytest.approx(expected.losses, rel=2e-5), engine
            torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=2e-4)


def test_published_counts() -> None:
    """LLaMA-7B, 10 positions: 0.0389 % of the model."""
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=4096, intermediate_size=16, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    adapt(model, PrefixConfig(prefix_length=10))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 32 * 10 * 4096 and 100 * trained / 6_738_415_616 == pytest.approx(0.0389, abs=1e-4)


SMALL = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
REFUSED = {
    "BertForSequenceClassification": "is no causal decoder",
    "DebertaV2Model": "takes no cache",
    "T5ForConditionalGeneration": "has an encoder and a decoder",
    "MistralForCausalLM": "keeps its past in another form (DynamicSlidingWindowLayer)",
    "MambaForCausalLM": "keeps its past in another form",
    "FalconForCausalLM": "keys and values of FalconForCausalLM are not 2 heads of 8",
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_it_does_not_serve(name: str) -> None:
    kind = getattr(transformers, name)
    sizes = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2} if name.startswith("T5") else SMALL
    sizes = sizes | ({"num_key_value_heads": 1} if "Mistral" in name else {})
    sizes = {k: v for k, v in sizes.items() if "Mamba" not in name or "heads" not in k}
    with torch.device("meta"):
        model = kind(kind.config_class(**sizes))
    said = refusal(lambda: adapt(model, PrefixConfig()))
    assert said.startswith("method=prefix: ") and REFUSED[name] in said and "take another method" in said


def test_activation_checkpointing_is_refused_by_settings_and_by_the_model() -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing true with method prefix"):
        RunConfig(adapter=PrefixConfig(), train=TrainConfig(gradient_checkpointing=True))
    with pytest.raises(ValueError, match="export_formats peft with method prefix and train_modules lm_head"):
        RunConfig(adapter=PrefixConfig(train_modules=("lm_head",)), export=ExportConfig(export_formats=("peft",)))
    assert RunConfig(adapter=PrefixConfig()).export.export_formats == ()
    assert RunConfig(adapter=LoraConfig()).export.export_formats == ("merged",)
    model: Any = tiny_llama(40)
    adapt(model, PrefixConfig(prefix_length=2))
    model.gradient_checkpointing_enable()
    tokens = torch.arange(5)[None]
    model.eval()
    model(input_ids=tokens)
    model.train()
    assert "leave checkpointing off" in refusal(lambda: model(input_ids=tokens))


@pytest.mark.parametrize("kind", MODELS)
def test_a_start_from_a_text_is_that_text_in_front(kind: str) -> None:
    model: Any = MODELS[kind]()
    config = PrefixConfig(prefix_length=LENGTH, prefix_text="of which a plain loop gives the tokens")
    plain, text, tokens = MODELS[kind](), [7, 4, 9, 5], torch.arange(3, 11).view(2, 4)
    adapt(model, config)
    optimizer = torch.optim.AdamW(parameter_groups(model, config, 1e-2))
    hooks = attach(model, optimizer, config, 1)
    assert "prefix_text has 2 tokens" in refusal(lambda: hooks.start(model, optimizer, text[:2]))
    model(tokens, labels=tokens).loss.backward()
    assert "prefix_text was not read" in refusal(optimizer.step)
    optimizer.zero_grad()
    hooks.start(model, optimizer, text)
    assert model.training == plain.training
    whole = torch.cat((torch.tensor(text[:LENGTH]).expand(2, -1), tokens), dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, plain(whole).logits[:, LENGTH:], rtol=0, atol=5e-5)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    hooks.finish()


def test_a_text_and_another_start_are_refused() -> None:
    for settings, said in (
        ({"prefix_init": "text"}, "without prefix_text"),
        ({"prefix_text": " "}, "give a text"),
        ({"prefix_text": "a", "prefix_init": "zero"}, "there can be one start"),
        ({"prefix_text": "a", "prefix_hidden_size": 4}, "an MLP makes"),
    ):
        with pytest.raises(UserError, match=said):
            PrefixConfig(**settings)  # type: ignore[arg-type]
    plain = {name: field.default for name, field in PrefixConfig.model_fields.items()}
    assert PrefixConfig.resolved(plain | {"prefix_text": "a"})["prefix_init"] == "text"
