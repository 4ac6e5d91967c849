"""Quantised backbones: equal on every engine, really sharded, trained as stated, merged into what was asked for."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from adalora_dist.artifacts.export import merge
from adalora_dist.backbones import float8, quantization
from adalora_dist.backbones.dequantized import quantization_record, quantized_weights, read_quantization_record
from adalora_dist.backbones.load import _refuse_unlike, load_backbone
from adalora_dist.backbones.merging import check_mergeable
from adalora_dist.backbones.quantization import (
    METHODS,
    REFUSED,
    dequantized,
    quantization_of,
    quantized_linears,
    support_table,
)
from adalora_dist.config.engines import ENGINES
from adalora_dist.config.methods import AdaLoraConfig
from adalora_dist.config.sections import ExportConfig, ModelConfig, QuantizationConfig, RunConfig, TrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.layers import Lambdas, SVDLinear
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt
from adalora_dist.training.verify import logit_differences
from tests.support.paths import ROOT
from tests.support.quantized_runs import (
    PROBE,
    Case,
    Trained,
    configuration,
    needs_torchao,
    of_methods,
    run,
    write_llama,
)
from tests.support.ranks import run_ranks
from tests.support.tiny_language_model import byte_tokenizer

bitsandbytes = pytest.importorskip("bitsandbytes")

ADAPTED = 14
TARGET = 21  # triplets: 1.5 on each


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("backbone"))


@lru_cache
def control(case: Case, folder: Path) -> Trained:
    [result] = run_ranks(1, run, Case(method=case.method, precision=case.precision, compact=case.compact), folder)
    return result


def check_equal(ranks: list[Trained], expected: Trained, rtol: float = 1e-5) -> None:
    for result in ranks:
        torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(expected.losses), rtol=rtol, atol=0)
        assert result.patterns == expected.patterns
        assert sum(list(result.patterns.values())[-1]) == TARGET
        assert sum(a.lam.numel() for a in result.adapters) == TARGET


# ------------------------------------------------------------------------------------------------ on every engine


def test_the_control_is_worth_comparing_with(folder):
    quantised, plain = control(Case(), folder), control(Case(method="none"), folder)
    assert quantised.num_quantized == ADAPTED and plain.num_quantized == 0
    assert quantised.losses[-1] < 0.95 * quantised.losses[0]
    assert len({tuple(p) for p in quantised.patterns.values()}) >= 3
    assert abs(quantised.losses[0] / plain.losses[0] - 1) > 1e-4  # 4 bits are not full precision


# The variants ride along with a cell each: evaluation between load and training, and recomputed activations.
VARIANTS = {
    "ddp": {"evaluate_first": True},
    "fsdp2": {"gradient_checkpointing": True, "evaluate_first": True},
    "zero2": {"gradient_checkpointing": True},
    "zero3": {"evaluate_first": True},
}
MARKS = {"fp4": pytest.mark.slow, "fp8": needs_torchao}
CELLS = [pytest.param(method, engine, marks=MARKS.get(method, ())) for method in METHODS for engine in ENGINES]


@pytest.mark.parametrize(("method", "engine"), CELLS)
def test_every_cell_of_the_table(method, engine, folder):
    case = Case(engine, method, **VARIANTS.get(engine, {}))
    if reason := REFUSED.get((method, engine)):
        with pytest.raises(UserError, match=f"quantization={method} with {engine}: {reason}; use"):
            quantization_of(configuration(case, folder, "unused"), engine)
        return
    expected = control(Case(method=method), folder)
    ranks = run_ranks(case.world_size, run, case, folder)
    check_equal(ranks, expected)
    assert all((r.engine, r.num_quantized, r.kept_bytes) == (engine, ADAPTED, 0) for r in ranks)


@pytest.mark.parametrize("case", [Case("zero3", gradient_checkpointing=True), Case("zero3", keep_small=True)], ids=str)
def test_zero3_recomputing_activations_and_keeping_small_parameters_whole(case, folder):
    check_equal(run_ranks(2, run, case, folder), control(Case(), folder))


@pytest.mark.parametrize("method", of_methods("nf4", "fp8"))
@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_bf16_engines_leave_the_packed_weights_alone(engine, method, folder):
    """Low precision moves scores, so patterns may differ between engines; never between ranks, and never in size."""
    expected = control(Case(method=method, precision="bf16"), folder)
    ranks = run_ranks(2, run, Case(engine, method, precision="bf16"), folder)
    assert all(r.patterns == ranks[0].patterns for r in ranks)
    assert sum(list(ranks[0].patterns.values())[-1]) == TARGET
    torch.testing.assert_close(torch.tensor(ranks[0].losses), torch.tensor(expected.losses), rtol=5e-2, atol=0)


@pytest.mark.parametrize("method", of_methods("nf4", "fp8"))
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_blocks_that_do_not_divide(engine, method, tmp_path):
    """40 x 100 weights are 62.5 blocks of 64, and 500 floats of packed bytes: shards end within blocks."""
    folder = write_llama(tmp_path, hidden_size=40, intermediate_size=100)
    check_equal(run_ranks(2, run, Case(engine, method), folder), run_ranks(1, run, Case(method=method), folder)[0])


@needs_torchao
def test_float8_that_ends_within_an_element(tmp_path):
    """Scales and weights of 15 x 6 are 150 bytes, 37.5 float32."""
    folder = write_llama(tmp_path, hidden_size=6, intermediate_size=15, num_attention_heads=1, num_key_value_heads=1)
    model, _ = load(folder, "fp8")
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    assert module.weight.shape == (38, 1)
    plain = AutoModelForCausalLM.from_pretrained(folder).get_submodule("model.layers.0.mlp.up_proj").weight
    assert ((dequantized(module) - plain).abs() <= plain.abs().amax(dim=1, keepdim=True) / 28 + 1e-7).all()
    check_equal(run_ranks(2, run, Case("fsdp2", "fp8"), folder), run_ranks(1, run, Case(method="fp8"), folder)[0])


def unrefused(rank: int, world_size: int, case: Case, folder: Path) -> Trained:
    REFUSED.clear()
    return run(rank, world_size, case, folder)


def test_refusals_are_still_needed(folder):
    """When one of these fails, bitsandbytes has learnt it: take the combination out of REFUSED."""
    with pytest.raises(AssertionError, match="'Parameter' object has no attribute 'CB'"):
        run_ranks(2, unrefused, Case("fsdp2", "int8"), folder)
    whole = control(Case(method="int8"), folder).held["linear_bytes"]
    for result in run_ranks(2, unrefused, Case("zero3", "int8"), folder):
        assert result.held["linear_bytes"] > whole
    assert set(REFUSED) == {("int8", "fsdp2"), ("int8", "zero3")}


def as_bitsandbytes_does(rank: int, world_size: int, case: Case, folder: Path) -> Trained:
    def settle(model: Any) -> None:
        for _, module in quantized_linears(model):
            module.support_avx512bf16_for_cpu = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adalora_dist.backbones.load.settle_quantized", settle)
        return run(rank, world_size, case, folder)


@needs_torchao
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_torchao_keeps_the_expanded_weight_and_this_does_not(precision, folder):
    """Of one map, in what autograd saves. The input is not needed: the weight is frozen."""
    config = configuration(Case(method="fp8", precision=precision), folder, "unused")
    loading = quantization_of(config, "single")
    theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=loading.loading, dtype=loading.compute)
    ours, _ = load_backbone(config.model, AutoModelForCausalLM, loading)
    kept = {}
    for whose, model in (("theirs", theirs), ("ours", ours)):
        saved: list[int] = []
        module = model.get_submodule("model.layers.0.mlp.up_proj")
        x = torch.randn(3, 64, dtype=loading.compute, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t.numel()), lambda _: None):
            assert module(x).requires_grad
        kept[whose] = sum(saved)
    assert kept == {"theirs": 64 * 128, "ours": 0}


def test_nothing_is_kept_between_forward_and_backward(folder):
    """bitsandbytes keeps the gathered weights (ZeRO-3) and inputs (int8); in every cell above it is 0 bytes."""
    for result in run_ranks(2, as_bitsandbytes_does, Case("zero3"), folder):
        assert result.kept_bytes > 30_000
    assert run_ranks(1, as_bitsandbytes_does, Case(method="int8"), folder)[0].kept_bytes > 30_000


# -------------------------------------------------------------------------------------------------------- sharded


@pytest.mark.parametrize(("method", "most"), [("nf4", 0.30), pytest.param("fp8", 0.51, marks=needs_torchao)])
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_packed_weights_are_sharded(engine, method, most, tmp_path, record_property):
    folder = write_llama(tmp_path, hidden_size=384, intermediate_size=1024)
    bf16_bytes = 2 * 2 * (384 * 384 * 2 + 384 * 192 * 2 + 3 * 384 * 1024)
    whole = run_ranks(1, run, Case(method=method, compact=False), folder)[0].held
    assert whole["importance_bytes"] == 2 * whole["adapter_bytes"] > 0
    assert whole["linear_bytes"] <= most * bf16_bytes
    for result in run_ranks(2, run, Case(engine, method, compact=False), folder):
        record_property(engine, result.held)
        assert result.held["linear_bytes"] <= 1.05 * most * bf16_bytes / 2
        assert result.held["adapter_bytes"] <= 1.05 * whole["adapter_bytes"] / 2
        assert result.held["importance_bytes"] <= 1.05 * whole["importance_bytes"] / 2


def test_memory_is_counted_from_storages(folder):
    """One process, by hand: 14 matrices of 73728 weights, float32 embedding, head and five norms."""
    held = control(Case(method="none", compact=False), folder).held
    assert held["linear_bytes"] == 4 * 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert held["other_bytes"] == 4 * (2 * 259 * 64 + 5 * 64)
    elements = 3 * 2 * (4 * 64 + 64 + 32 + 64 + 32 + 3 * (64 + 128) + 7)  # r (d_in + d_out + 1) of every matrix
    assert held["adapter_bytes"] == 4 * elements and held["importance_bytes"] == 8 * elements
    compacted = control(Case(method="none"), folder)
    kept = sum(a.lam.numel() * (sum(len(x) for x in (a.P, a.Q.T)) + 1) for a in compacted.adapters)
    assert compacted.held["adapter_bytes"] == 4 * kept < held["adapter_bytes"]
    assert compacted.held["importance_bytes"] == 0


# ---------------------------------------------------------------------------------------------------------- modules


def load(folder: Path, method: str = "nf4", **sections: Any) -> tuple[Any, RunConfig]:
    config = RunConfig(
        model=ModelConfig(name=str(folder)), quantization=QuantizationConfig(quantization=method), **sections
    )
    model, _ = load_backbone(config.model, AutoModelForCausalLM, quantization_of(config, "single"))
    return model, config


@pytest.mark.parametrize("method", of_methods(*METHODS))
def test_embeddings_norms_and_head_stay_as_the_files_have_them(method, folder):
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model, _ = load(folder, method)
    names = {name for name, _ in quantized_linears(model)}
    assert names == {f"model.layers.{i}.{m}" for i in (0, 1) for m in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj")}  # fmt: skip
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in names:
            assert torch.equal(parameter, expected[name]) and parameter.dtype == expected[name].dtype


def test_modules_that_are_trained_in_full_stay_too(folder):
    adapter = AdaLoraConfig(targets=("q_proj", "v_proj"), train_modules=("o_proj", r".*\.1\.mlp\.up_proj"))
    model, config = load(folder, adapter=adapter)
    names = {name.rpartition(".")[2] for name, _ in quantized_linears(model)}
    assert "o_proj" not in names and "lm_head" not in names and {"q_proj", "up_proj"} <= names
    adapt(model, config.adapter)
    trained = model.get_submodule("model.layers.1.mlp.up_proj").weight
    assert trained.requires_grad and trained.dtype == torch.float32


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", of_methods(*METHODS))
def test_the_branch_is_added_in_place_soundly(method, training, settled, folder):
    """Gradients of x, P, lambda and Q over the quantised base, against the same sum out of place."""
    model, _ = load(folder, method)
    base = model.get_submodule("model.layers.0.mlp.up_proj")
    if not settled:
        del base.forward
    torch.manual_seed(0)
    layer = SVDLinear(base, 64, 128, 3, 2.0).train(training)
    lam = Lambdas([layer]).lam
    with torch.no_grad():
        for parameter in (layer.P, lam, layer.Qt):
            parameter.normal_()
    inputs = [torch.randn(2, 5, 64, requires_grad=True), layer.P, lam, layer.Qt]
    expected = base(inputs[0]) + 2.0 * (inputs[0] @ layer.Qt * lam) @ layer.P.T
    actual = layer(inputs[0])
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
    for ours, summed in zip(*gradients, strict=True):  # sums in another order: of the whole, not element by element
        assert (ours - summed).norm() <= 1e-5 * summed.norm() and summed.norm() > 0


@pytest.mark.parametrize("method", of_methods(*METHODS))
def test_the_gradient_is_that_of_the_dequantised_weight(method, folder):
    model, _ = load(folder, method)
    module = model.get_submodule("model.layers.0.mlp.up_proj").train()
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = module(x)
    torch.testing.assert_close(y, x @ dequantized(module).T, rtol=1e-4, atol=1e-4)
    [gradient] = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(gradient, torch.ones_like(y) @ dequantized(module))


def test_evaluation_leaves_the_weights_as_they_are(folder):
    """On CPUs with AVX512-BF16 bitsandbytes would repack them, round their scales, and lose the gradient."""
    model, _ = load(folder)
    module = model.get_submodule("model.layers.0.mlp.up_proj")
    before = module.weight.data.view(torch.uint8).clone()  # as float32 some bytes are nan
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([PROBE]))
    assert torch.equal(module.weight.data.view(torch.uint8), before)


# ------------------------------------------------------------------------------------------------------------ merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", of_methods(*METHODS))
def test_the_quantised_value_of_a_file_is_what_was_trained_with(method, dtype, tmp_path):
    write_llama(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).save_pretrained(tmp_path)
    model, config = load(tmp_path, method)
    plain = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    weights = quantized_weights(model, config)
    assert len(weights) == ADAPTED
    (tmp_path / "quantized.json").write_text(json.dumps(quantization_record(weights)))
    assert read_quantization_record(tmp_path / "quantized.json") == weights  # what a later merge starts from
    for name, module in quantized_linears(model):
        recomputed = weights[f"{name}.weight"](plain[f"{name}.weight"].detach())
        # Live 4-bit weights are shown in the type of the files, but computed with in that of precision.
        assert torch.equal(recomputed.to(dequantized(module).dtype), dequantized(module))


FLOAT8 = [pytest.param(Case(engine, "fp8"), marks=needs_torchao) for engine in ("single", "fsdp2", "zero3")]


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_zeros_stay_so_in_float8(dtype, tmp_path):
    """torchao divides by the largest of a row."""
    model = AutoModelForCausalLM.from_pretrained(write_llama(tmp_path), dtype=dtype)
    name = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[3] = 0
        model.get_submodule(name).weight[4] = 1e-6  # a scale of 2e-9, which float16 has not
    model.save_pretrained(tmp_path)
    quantised, config = load(tmp_path, "fp8")
    weight = dequantized(quantised.get_submodule(name))
    torch.testing.assert_close(weight, model.get_submodule(name).weight.float(), rtol=0.07, atol=2e-6)
    assert not weight[3].any() and weight.count_nonzero() >= weight.numel() - 256
    again = quantized_weights(quantised, config)[f"{name}.weight"](model.get_submodule(name).weight.detach())
    assert torch.equal(again, weight)


@pytest.mark.parametrize("case", [Case(), Case(method="int8"), Case("fsdp2"), Case("zero3"), *FLOAT8], ids=str)
def test_round_trip(case, folder, tmp_path, record_property):
    """The dequantised merge says what the trained model said; the original one differs by what quantisation cost."""
    trained = run_ranks(case.world_size, run, case, folder)[0]
    differences = {}
    for base, weights in (("original", None), ("dequantized", trained.base_weights)):
        merge(trained.adapters, folder, tmp_path / base, base_weights=weights, show_progress=False)
        differences[base] = logit_differences(AutoModelForCausalLM, tmp_path / base, PROBE, trained.logits)
        record_property(base, differences[base]._asdict())
    spread = trained.logits.std().item()
    # With int8, bitsandbytes rounds activations too when it evaluates: no weights say exactly the same.
    assert differences["dequantized"].largest < (0.2 if case.method == "int8" else 1e-4) * spread
    assert 1e-3 * spread < differences["original"].mean < differences["original"].largest < 3 * spread


def test_the_dequantised_merge_covers_matrices_without_adapters(folder, tmp_path):
    model, config = load(folder)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROBE])).logits[0]
    merge([], folder, tmp_path / "merged", base_weights=quantized_weights(model, config), show_progress=False)
    assert logit_differences(AutoModelForCausalLM, tmp_path / "merged", PROBE, logits).largest < 1e-4


def test_conv1d_is_merged_in_its_own_layout(tmp_path):
    """GPT-2 stores (d_in, d_out); some of its matrices are square, where a mistake would raise nothing."""
    torch.manual_seed(0)
    base = tmp_path / "base"
    GPT2LMHeadModel(
        GPT2Config(vocab_size=259, n_embd=64, n_layer=1, n_head=2, n_positions=64, initializer_range=0.2)
    ).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    model, config = load(base, adapter=AdaLoraConfig(init_rank=2, target_rank=1))
    matrices = adapt(model, config.adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    hooks = attach(model, optimizer, config.adapter, 100)
    model(input_ids=torch.tensor([PROBE])).logits.square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        for matrix in matrices:
            matrix.lam.normal_()
        logits = model.eval()(input_ids=torch.tensor([PROBE])).logits[0]
    adapters = hooks.updates()
    hooks.detach()
    assert all(a.weight_is_transposed for a in adapters) and len(adapters) == 4
    merge(adapters, base, tmp_path / "merged", base_weights=quantized_weights(model, config), show_progress=False)
    assert logit_differences(AutoModelForCausalLM, tmp_path / "merged", PROBE, logits).largest < 1e-4


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("precision", "storage", "compute"),
    [("bf16", "float32", "bfloat16"), ("fp32", "bfloat16", "float32"), ("fp16", "bfloat16", "float16")],
)
def test_a_storage_type_that_engines_would_convert(precision, storage, compute):
    with pytest.raises(ValueError, match=f"quant_storage {storage} with precision {precision}: .* destroy .*{compute}"):
        RunConfig(
            train=TrainConfig(precision=precision),
            quantization=QuantizationConfig(quantization="nf4", quant_storage=storage),
        )


def test_a_storage_type_that_fsdp2_leaves_whole(folder):
    config = configuration(Case(storage="uint8"), folder, "unused")
    with pytest.raises(UserError, match="quant_storage=uint8 with fsdp2: .* whole on every process; use quant_storage"):
        quantization_of(config, "fsdp2")
    assert quantization_of(config, "zero3").loading.bnb_4bit_quant_storage == torch.uint8


def test_missing_bitsandbytes(folder, monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^quantization=nf4 needs bitsandbytes: pip install 'adalora-dist\[quant\]'$"):
        quantization_of(configuration(Case(), folder, "unused"), "single")


def test_missing_or_old_torchao(folder, tmp_path, monkeypatch):
    def found(name: str) -> str:
        if versions:
            return versions[0]
        raise PackageNotFoundError(name)

    monkeypatch.setattr(float8, "version", found)
    config, versions = configuration(Case(method="fp8"), folder, "unused"), []
    with pytest.raises(UserError, match=r"^quantization=fp8 needs torchao: pip install 'adalora-dist\[fp8\]'$"):
        quantization_of(config, "single")
    entry = {"shape": [2, 2], "is_transposed": False, "method": "fp8", "double_quant": True}
    record = {"up.weight": entry | {"dtype": "torch.float32", "device": "cpu"}}
    (tmp_path / "quantized.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="^quantization=fp8 needs torchao"):  # of a merge on another machine
        read_quantization_record(tmp_path / "quantized.json")
    versions = ["0.17.0"]
    with pytest.raises(UserError, match=r"^quantization=fp8 with torchao 0.17.0: must be 0.18 or later; pip install"):
        quantization_of(config, "single")


@needs_torchao
def test_a_torchao_that_has_changed_its_weights(folder, monkeypatch):
    from torchao.quantization import Float8WeightOnlyConfig, PerTensor

    monkeypatch.setattr(float8, "_weight_only", lambda: Float8WeightOnlyConfig(granularity=PerTensor()))
    with pytest.raises(UserError, match=r"its float8 weights are not those of 0.18, .* pip install 'torchao==0.18.\*'"):
        load(folder, "fp8")


@needs_torchao
def test_maps_that_torchao_would_leave_or_break(folder, tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=8, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"transformer.h.0.attn.c_attn is a Conv1D, which torchao leaves .* nf4$"):
        load(tmp_path, "fp8")

    class Router(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).softmax(dim=-1)

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Router(4, 4))
    with pytest.raises(UserError, match=r"model='m': 1 is a Router, which computes more than a product"):
        _refuse_unlike(model, "m")
    _refuse_unlike(model[:1], "m")


@needs_torchao
def test_float8_is_not_merged_to_generate(folder):
    model, config = load(folder, "fp8")
    adapt(model, config.adapter)
    with pytest.raises(UserError, match="merge_to_generate true: there is nothing to merge, .* not quantised"):
        check_mergeable(model)


def test_merging_into_what_was_not_quantised():
    with pytest.raises(ValueError, match="merge_into dequantized with quantization none"):
        RunConfig(export=ExportConfig(merge_into="dequantized"))


def test_a_model_that_is_quantised_already(folder, tmp_path):
    model, config = load(folder)
    del_forward(model)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(UserError, match="is quantised already: give the original model, or leave out quantization$"):
        load(tmp_path)


def del_forward(model: Any) -> None:
    for _, module in quantized_linears(model):
        del module.forward


def test_weights_that_do_not_fill_the_storage_type(tmp_path):
    """12 x 15 weights are 90 bytes, which are no whole number of float32."""
    folder = write_llama(tmp_path, hidden_size=12, intermediate_size=15, num_attention_heads=2, num_key_value_heads=2)
    with pytest.raises(UserError, match="quant_storage"):
        load(folder)


# -------------------------------------------------------------------------------------------------------------- docs


def test_the_documentation_has_the_tested_table():
    text = (ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- support -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert found and found[1] == support_table()
