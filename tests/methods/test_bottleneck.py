"""Bottleneck adapters: their formulas on real layers, where they lie, what is counted, and files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import silu
from transformers import BartConfig, BertConfig, DebertaV2Config, LlamaConfig
from transformers.models.bert.modeling_bert import BertLayer

from adalora_dist.artifacts.commands import export_run
from adalora_dist.artifacts.export import load_adapter, read_adapter, save_adapter
from adalora_dist.config.methods import METHODS as SECTIONS
from adalora_dist.config.methods import method_config
from adalora_dist.config.sections import ExportConfig, RunConfig
from adalora_dist.methods import METHODS
from adalora_dist.methods.bottleneck_layer import Bottleneck
from adalora_dist.methods.branch import drawn_number
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt, parameter_groups
from adalora_dist.methods.protocol import adapters_of
from tests.support.models import Net
from tests.support.refusals import refusal
from tests.support.tiny_language_model import logits, tiny_llama

NAMES = ("houlsby", "pfeiffer", "adapterdrop", "series", "parallel")
SMALL = dict(vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
BERT = BertConfig(**SMALL, max_position_embeddings=32)


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(BERT).double().eval()


def learn(model: nn.Module) -> None:
    torch.manual_seed(1)
    for layer in adapters_of(model):
        for p in layer.parameters(recurse=False):
            nn.init.normal_(p, std=0.2)


def f(layer: Any, h: torch.Tensor, activation: Any) -> torch.Tensor:
    """The formula, from the specification."""
    d, u = layer.D, layer.U
    c_d, c_u = (0, 0) if layer.c_d is None else (layer.c_d, layer.c_u)
    return activation(h @ d.T + c_d) @ u.T + c_u


def layer_output(layer: BertLayer, x: torch.Tensor, method: str, adapters: dict[str, Any]) -> torch.Tensor:
    """A BERT layer with adapters, put together by hand from its own frozen parts."""
    attention, output = layer.attention, layer.output

    def plain(module: Any) -> Any:
        return getattr(module, "base", module)

    given, *_ = attention.self(x)
    o = plain(attention.output.dense)(given)
    if method == "houlsby":
        o = o + f(adapters["attention.output.dense"], o, silu)
    h = attention.output.LayerNorm(o + x)
    inner = plain(layer.intermediate.dense)(h)
    if method == "parallel":
        inner = inner + f(adapters["intermediate.dense"], h, torch.tanh)
    inner = torch.nn.functional.gelu(inner)
    out, norm = plain(output.dense)(inner), plain(output.LayerNorm)
    if method == "houlsby":
        out = out + f(adapters["output.dense"], out, silu)
    if method == "series":
        out = out + f(adapters["output.dense"], out, torch.tanh)
    if method == "parallel":
        out = out + f(adapters["output.dense"], inner, torch.tanh)
    if method == "pfeiffer":
        seen = norm(out + h)
        out = out + f(adapters["output.LayerNorm"], seen, torch.relu)
    return norm(out + h)


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "series", "parallel"])
def test_formulas_on_a_bert_layer(method: str) -> None:
    model = bert()
    adapt(model, method_config(method, bottleneck_size=5))
    model.double()
    learn(model)
    layer = model.bert.encoder.layer[0]
    prefix = "bert.encoder.layer.0."
    adapters = {a.name.removeprefix(prefix): a for a in adapters_of(model) if a.name.startswith(prefix)}
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), layer_output(layer, x, method, adapters)
    y = y if isinstance(y, torch.Tensor) else y[0]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    trained = [p for a in adapters.values() for p in a.trained().values()]
    direction = torch.randn_like(y)
    mine = torch.autograd.grad((y * direction).sum(), [x, *trained])
    for found, other in zip(mine, torch.autograd.grad((expected * direction).sum(), [x, *trained]), strict=True):
        torch.testing.assert_close(found, other, rtol=0, atol=1e-12)


def test_series_before_a_matrix() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 9))
    adapt(model, method_config("series", positions=("0",), bottleneck_size=4, side="before"))
    learn(model)
    model.double()
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), model[0].base(x + f(model[0], x, torch.tanh)), rtol=0, atol=1e-12)
    assert model[0].D.shape == (4, 6) and model[0].U.shape == (6, 4) and model[0].c_d is None


POSITIONS = {
    ("llama", "houlsby"): {"self_attn.o_proj": "behind", "mlp.down_proj": "behind"},
    ("llama", "pfeiffer"): {"mlp.down_proj": "behind"},
    ("llama", "series"): {"mlp.down_proj": "behind"},
    ("llama", "parallel"): {"mlp.up_proj": "beside", "mlp.down_proj": "beside"},
    ("bert", "houlsby"): {"attention.output.dense": "behind", "output.dense": "behind"},
    ("bert", "pfeiffer"): {"output.LayerNorm": "norm"},
    ("deberta", "pfeiffer"): {"output.LayerNorm": "norm"},
    ("bart", "pfeiffer"): {"final_layer_norm": "norm"},
    ("bart", "houlsby"): {"self_attn.out_proj": "behind", "encoder_attn.out_proj": "behind", "fc2": "behind"},
    ("gpt2", "houlsby"): {"attn.c_proj": "behind", "mlp.c_proj": "behind"},
    ("gpt2", "parallel"): {"mlp.c_fc": "beside", "mlp.c_proj": "beside"},
    ("t5", "houlsby"): {"SelfAttention.o": "behind", "EncDecAttention.o": "behind", "DenseReluDense.wo": "behind"},
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=1),
    "bert": BERT,
    "deberta": DebertaV2Config(**SMALL, relative_attention=True),
    "bart": BartConfig(vocab_size=40, d_model=16, encoder_layers=3, decoder_layers=3, encoder_attention_heads=2,
                       decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24),
    "gpt2": transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2),
    "t5": transformers.T5Config(vocab_size=40, d_model=16, d_ff=24, d_kv=8, num_layers=3, num_heads=2),
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "method"), POSITIONS)
def test_positions(architecture: str, method: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(CONFIGS[architecture])
    adapt(model, method_config(method, bottleneck_size=3))
    expected = POSITIONS[architecture, method]
    found: dict[str, Any] = {}
    for layer in adapters_of(model):
        assert isinstance(layer, Bottleneck)
        end = next(end for end in expected if layer.name.endswith(f".{end}"))
        found.setdefault(end, []).append(layer.form)
    assert {end: forms[0] for end, forms in found.items()} == expected
    twice = {"bart": 2, "t5": 2}.get(architecture, 1)
    only_decoder = {"encoder_attn.out_proj", "EncDecAttention.o"}
    for end, forms in found.items():
        assert len(forms) == 3 * (1 if end in only_decoder else twice) and len({*forms}) == 1


def test_where_names_are_unknown_they_are_asked_for() -> None:
    said = refusal(lambda: adapt(Net(), method_config("houlsby")))
    assert "attention output maps of Net" in said and "name the matrices to adapt in positions" in said
    said = refusal(lambda: adapt(bert(), method_config("adapterdrop", drop_layers=3)))
    assert said.startswith("drop_layers=3: BertForSequenceClassification has 3 layers") and "from 0 to 2" in said


def test_two_forms_in_one_model_are_refused() -> None:
    """They would be loaded as the first one's."""
    for method in ("pfeiffer", "adapterdrop"):
        changes = {"drop_layers": 1} if method == "adapterdrop" else {}
        config = method_config(method, positions=("published", "query"), **changes)
        said = refusal(lambda config=config: adapt(bert(), config))
        assert "two forms of adapters" in said and "output.LayerNorm" in said and "query" in said


def test_adapterdrop_leaves_the_lowest_layers_alone() -> None:
    for placement, per_layer in (("pfeiffer", 1), ("houlsby", 2)):
        model = bert()
        adapt(model, method_config("adapterdrop", drop_layers=2, placement=placement))
        assert [a.name.split(".")[3] for a in adapters_of(model)] == ["2"] * per_layer
    model = bert()
    settings = method_config("adapterdrop", drop_layers=2, drop="random")
    layers: Any = adapt(model, settings, seed=4)
    learn(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings, 1e-3))
    hooks = attach(model, optimizer, settings, 9)
    seed, seen = layers[0].depth.seed, set()
    model.train()
    for step in range(9):
        dropped = drawn_number(seed, step, 0, 2)
        seen.add(dropped)
        assert hooks.method_step.record(step) == {"dropped_layers": dropped}
        x = torch.randn(4, 16, dtype=torch.float64)
        model.double()
        for layer in layers:
            is_there = not torch.equal(layer.added(x), torch.zeros_like(x))
            assert is_there == (layer.layer >= dropped), (step, layer.name)
        model.float()
        loss = model(input_ids=torch.arange(6)[None], labels=torch.tensor([1])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen == {0, 1, 2}
    model.eval()
    assert all(layer.added(torch.randn(2, 16)).abs().max() > 0 for layer in layers)


@pytest.mark.parametrize("method", NAMES)
def test_published_starts(method: str) -> None:
    """Zero is the plain model; what was published is near it."""
    for init, bound in ((None, 0.2), ("zero", 1e-12)):
        changed = {} if init is None else {"bottleneck_init": init}
        model, plain = bert(), bert()
        adapt(model, method_config(method, **changed, **({"drop_layers": 1} if method == "adapterdrop" else {})))
        layers: Any = adapters_of(model)
        sd = {"truncated": 0.01, "normal": 0.02}[method_config(method).bottleneck_init]  # type: ignore[attr-defined]
        drawn = torch.cat([layer.D.flatten() for layer in layers])
        assert init or 0.8 * sd < drawn.std() < 1.1 * sd and (method != "houlsby" or drawn.abs().max() <= 0.02)
        tokens = torch.arange(12)[None]
        difference = (model(input_ids=tokens).logits - plain(input_ids=tokens).logits).abs().max()
        assert difference <= bound and (init or difference > 0)


def count(config: Any, method: str, **settings: Any) -> int:
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    adapt(model, method_config(method, **settings))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_published_counts() -> None:
    """RoBERTa-base AdptD; DeBERTaV3-base Houlsby and Pfeiffer; LLaMA-7B series and parallel: what formulas give."""
    roberta = transformers.RobertaConfig()
    assert count(roberta, "pfeiffer", bottleneck_size=16) == 304_320
    assert count(roberta, "pfeiffer", bottleneck_size=48) == 894_528
    base = DebertaV2Config(vocab_size=8, hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    assert [round(count(base, "houlsby", bottleneck_size=d) / 1e6, 3) for d in (32, 16, 8)] == [1.199, 0.609, 0.314]
    assert [round(count(base, "pfeiffer", bottleneck_size=d) / 1e6, 2) for d in (64, 32, 16)] == [1.19, 0.6, 0.3]
    llama = LlamaConfig(vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32)
    whole = 6_738_415_616
    for method, percent in (("series", 0.986), ("parallel", 3.542)):
        trained = count(llama, method)
        assert 100 * trained / (whole + trained) == pytest.approx(percent, abs=1e-3)


def test_biases_are_not_decayed() -> None:
    model = bert()
    groups = (
        parameter_groups(model, settings, 1e-3)
        if (settings := method_config("houlsby")) and adapt(model, settings)
        else []
    )
    assert [group.get("weight_decay") for group in groups] == [None, 0.0]
    assert all(p.dim() == 1 for p in groups[1]["params"])


def test_a_folder_carries_a_norms_adapter_and_nothing_merges(tmp_path: Path) -> None:
    model = transformers.BertForSequenceClassification(BERT).eval()
    plain = transformers.BertForSequenceClassification(BERT).eval()
    plain.load_state_dict(model.state_dict())
    settings = method_config("pfeiffer", bottleneck_size=5)
    layers = adapt(model, settings)
    learn(model)
    parts = {name: p.detach() for layer in layers for name, p in layer.trained().items()}
    described = {layer.name: layer.description() for layer in layers}
    updates = METHODS["pfeiffer"].updates(described, {}, None, parts.get)
    save_adapter(updates, tmp_path / "adapter", "m", None)
    load_adapter(plain, tmp_path / "adapter")
    tokens = torch.arange(12)[None]
    assert torch.equal(plain(input_ids=tokens).logits, model(input_ids=tokens).logits)
    for form in ("merged", "lora", "peft"):
        said = refusal(lambda form=form: export_run(tmp_path / "adapter", form, tmp_path / "out"))
        assert said == (
            f"--to {form}: what method pfeiffer leaves cannot be written so; load its adapter folder with "
            "load_adapter(model, folder)"
        )
    assert "is not in this model" in refusal(lambda: load_adapter(tiny_llama(40), tmp_path / "adapter"))
    file = tmp_path / "adapter/adapter.json"
    content = file.read_text()
    for old, new in (('"norm"', '"norms"'), ('"relu"', '"relo"'), ("true", "1")):
        file.write_text(content.replace(old, new))
        assert "settings: form" in refusal(lambda: read_adapter(tmp_path / "adapter"))


def test_a_run_asks_for_no_form_and_is_refused_those_that_there_are_not() -> None:
    for method in NAMES:
        run = RunConfig(adapter=SECTIONS[method]())
        assert run.export.export_formats == () and RunConfig.model_validate(run.model_dump()) == run
        with pytest.raises(ValueError, match=f"export_formats merged with method {method}: it cannot be written so"):
            RunConfig(adapter=SECTIONS[method](), export=ExportConfig(export_formats=("merged",)))
        with pytest.raises(ValueError, match=f"export_formats merged with method {method}"):
            RunConfig(adapter=SECTIONS[method](), export=ExportConfig(push_to_hub="a/b"))
    assert RunConfig().export.export_formats == ("merged",)


def test_dropout_is_on_what_the_adapter_reads() -> None:
    model: Any = tiny_llama(40)
    plain = logits(model)
    adapt(model, method_config("parallel", bottleneck_size=4, dropout=0.5, bottleneck_init="zero"))
    assert torch.equal(logits(model), plain)
    learn(model)
    assert torch.equal(logits(model), logits(model))
    model.train()
    first, again = (model(input_ids=torch.arange(5)[None]).logits for _ in range(2))
    assert not torch.equal(first, again)
