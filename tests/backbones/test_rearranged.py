"""What loading splits and joins is merged into, and read from, the tensors that the files have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.core_model_loading import Concatenate, ConversionOps, PermuteForRope, Transpose, WeightConverter

from adalora_dist.artifacts.base_weights import of_base
from adalora_dist.artifacts.export import merge, task_settings
from adalora_dist.backbones.files import stored_tensors, weight_files
from adalora_dist.backbones.names import FileNames, on_meta
from adalora_dist.backbones.rearranged import Rearranged, is_rearranged
from adalora_dist.methods.update import AdapterWeights
from tests.support.plain_models import CAUSAL, PLAIN, REARRANGED
from tests.support.refusals import refusal


def read(folder: Path, auto_class: Any) -> tuple[FileNames, Any]:
    names = FileNames.of(on_meta(auto_class, AutoConfig.from_pretrained(folder)), stored_tensors(weight_files(folder)))
    return names, auto_class.from_pretrained(folder)


@pytest.fixture(params=REARRANGED)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, FileNames, Any]:
    make, auto_class = REARRANGED[request.param]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    return tmp_path / "base", *read(tmp_path / "base", auto_class)


def test_everything_trained_is_loaded_again(case: tuple[Path, FileNames, Any], tmp_path: Path) -> None:
    folder, names, model = case
    assert any(is_rearranged(names, name) for name, _ in model.named_parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape)
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    merge([], folder, tmp_path / "merged", trained=trained, task=task_settings(model), show_progress=False)
    for name, parameter in type(model).from_pretrained(tmp_path / "merged").named_parameters():
        assert torch.equal(parameter, trained[name]), name
    before, after = (load_file(f / "model.safetensors").keys() for f in (folder, tmp_path / "merged"))
    assert before <= after and all(name.startswith("classifier") or "pooler" in name for name in after - before)


def test_adapters_are_added_and_all_else_is_left(case: tuple[Path, FileNames, Any], tmp_path: Path) -> None:
    folder, names, model = case
    adapters, weights = [], dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(("q_proj", "v_proj", "o_proj", "gate_proj")):
            d_out, d_in = module.weight.shape
            adapters.append(
                AdapterWeights(name, torch.randn(d_out, 2), torch.ones(2), torch.randn(2, d_in), 0.5, False)
            )
    merge(adapters, folder, tmp_path / "merged", task=task_settings(model), show_progress=False)
    added = {f"{adapter.name}.weight": adapter.delta() for adapter in adapters}
    merged = dict(type(model).from_pretrained(tmp_path / "merged").named_parameters())
    for name in weights.keys() & names.sources.keys():
        if name in added:
            torch.testing.assert_close(merged[name], weights[name].detach() + added[name])
        else:
            assert torch.equal(merged[name], weights[name]), name
    wide = AdapterWeights(adapters[0].name, torch.randn(4, 1), torch.ones(1), torch.randn(1, 5), 0.5, False)
    line = refusal(lambda: merge([wide], folder, tmp_path / "other", task=task_settings(model), show_progress=False))
    assert "has shape (16, 16) in the base, the run's has (4, 5)" in line
    asked = of_base(adapters, folder, names, None, lambda adapter, weight: weight)
    assert all(torch.equal(asked[adapter.name], weights[f"{adapter.name}.weight"]) for adapter in adapters)


class Doubled(ConversionOps):
    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
        return {target_patterns[0]: 2 * next(iter(input_dict.values()))[0]}


class Cut(Doubled):
    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
        return {target_patterns[0]: next(iter(input_dict.values()))[0][1:]}


def with_rule(folder: Path, *rules: WeightConverter) -> FileNames:
    """A LLaMA's names in its files, as if transformers converted some tensors."""
    PLAIN["llama"][0]().save_pretrained(folder)
    names, _ = read(folder, CAUSAL)
    assert names.rules is not None
    names.rules._converters[:] = rules
    names.rules._by_pattern |= {pattern: rule for rule in rules for pattern in rule.source_patterns}
    stored = stored_tensors(weight_files(folder))
    found, computed = dict(names.sources), set()
    for name in found:
        if any("o_proj" in pattern or "up_proj" in pattern for rule in rules for pattern in rule.source_patterns):
            if name.endswith(("o_proj.weight", "up_proj.weight")):
                found[name], computed = (stored[name],), computed | {name}
    return FileNames(names.model_class, found, frozenset(computed), (), {}, (), names.rules)


@pytest.mark.parametrize(
    "operations", [[Transpose(0, 1)], [PermuteForRope()], [Transpose(0, 1), PermuteForRope()]], ids=str
)
def test_any_rule_that_moves_numbers_goes_both_ways(operations: list[ConversionOps], tmp_path: Path) -> None:
    names = with_rule(tmp_path, WeightConverter("self_attn.o_proj.weight", "self_attn.o_proj.weight", operations))
    name = "model.layers.0.self_attn.o_proj.weight"
    found, stored = Rearranged(names, name), load_file(tmp_path / "model.safetensors")[name]
    assert names.rules is not None
    assert torch.equal(found.read(name), names.rules.converted({name: stored})[name])
    new = torch.randn(stored.shape)
    written = found.changed(name, stored, {name: lambda _: new})
    assert torch.equal(names.rules.converted({name: written})[name], new)


@pytest.mark.parametrize("operation", [Doubled(), Cut(), Concatenate(2)], ids=lambda op: type(op).__name__)
def test_a_rule_that_computes_is_refused(operation: ConversionOps, tmp_path: Path) -> None:
    names = with_rule(tmp_path, WeightConverter("mlp.up_proj.weight", "mlp.up_proj.weight", [operation]))
    name = "model.layers.0.mlp.up_proj.weight"
    assert "is computed from other tensors of its files" in refusal(Rearranged, names, name)
