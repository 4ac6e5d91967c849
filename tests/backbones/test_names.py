"""Names in files and names in models: what is loaded from where, and that what is written is what is loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from adalora_dist.artifacts.export import merge, task_settings
from adalora_dist.backbones.files import stored_tensors, weight_files
from adalora_dist.backbones.names import FileNames, head_prefixes, names_in, new_backbone_modules, on_meta
from adalora_dist.methods.update import AdapterWeights
from tests.support.plain_models import (
    CAUSAL,
    CLASSIFIER,
    DECODER,
    ENCODER,
    EXPERTS,
    PLAIN,
)
from tests.support.refusals import refusal


def write(model: Any, folder: Path, rename: dict[str, str] | None = None) -> None:
    """As ``save_pretrained`` does, and then with other spellings."""
    model.save_pretrained(folder)
    [file] = weight_files(folder)
    tensors = load_file(file)
    for old, new in (rename or {}).items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, file, {"format": "pt"})


OLD = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
CASES = [(kind, None) for kind in PLAIN] + [
    (kind, OLD)
    for kind in ("bert without pooler", "bert without prefix", "roberta", "electra", "distilbert", "albert", "deberta")
]


@pytest.fixture(params=CASES, ids=lambda case: case[0] + (", old spelling" if case[1] else ""))
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    (make, auto_class), rename = PLAIN[request.param[0]], request.param[1]
    torch.manual_seed(0)
    write(make(), tmp_path / "base", rename)
    return tmp_path / "base", auto_class


def names_and_model(folder: Path, auto_class: Any, **changes: Any) -> tuple[FileNames, Any, dict[str, Any]]:
    config = tf.AutoConfig.from_pretrained(folder)
    for key, value in changes.items():
        setattr(config, key, value)
    names = FileNames.of(on_meta(auto_class, config), stored_tensors(weight_files(folder)))
    model, report = auto_class.from_pretrained(
        folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    return names, model, report


def test_headers_say_what_loading_does(case: tuple[Path, Any]) -> None:
    folder, auto_class = case
    names, model, report = names_and_model(folder, auto_class)
    parameters = dict(model.named_parameters())
    assert set(names.missing) == report["missing_keys"] & parameters.keys()
    assert set(names.unexpected) == report["unexpected_keys"]
    assert not names.computed and not names.mismatched
    assert all(name.startswith(head_prefixes(model)) or "pooler" in name for name in names.missing)
    tensors = load_file(folder / "model.safetensors")
    elsewhere = parameters.keys() - names.sources.keys() - set(names.missing)
    assert all("embed_positions" in name for name in elsewhere)  # Marian's are sines, and in no file
    for name in parameters.keys() & names.sources.keys():
        assert torch.equal(tensors[names.sources[name][0].key], parameters[name])
        assert names.sources[name][0].shape == parameters[name].shape


def test_everything_trained_is_loaded_again(case: tuple[Path, Any], tmp_path: Path) -> None:
    folder, auto_class = case
    _, model, _ = names_and_model(folder, auto_class)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    trained = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    merge([], folder, tmp_path / "merged", trained=trained, task=task_settings(model), show_progress=False)
    again, report = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] & trained.keys()
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    # Under the names of the files, beside which there are new modules alone.
    before, after = (load_file(f / "model.safetensors").keys() for f in (folder, tmp_path / "merged"))
    new = (*head_prefixes(model), "bert.pooler", "albert.pooler", "model.encoder.embed_pos", "model.decoder.embed_pos")
    assert before <= after and all(name.startswith(new) for name in after - before)


def test_adapters_are_added_to_what_the_files_have(case: tuple[Path, Any], tmp_path: Path) -> None:
    folder, auto_class = case
    names, model, _ = names_and_model(folder, auto_class)
    adapters, expected = [], {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_matrix = isinstance(module, torch.nn.Linear | tf.pytorch_utils.Conv1D) and "lm_head" not in name
        if not is_matrix or f"{name}.weight" not in names.sources:
            continue
        is_transposed = isinstance(module, tf.pytorch_utils.Conv1D)
        d_out, d_in = weight.shape[::-1] if is_transposed else weight.shape
        adapter = AdapterWeights(name, torch.randn(d_out, 2), torch.ones(2), torch.randn(2, d_in), 0.5, is_transposed)
        adapters.append(adapter)
        expected[f"{name}.weight"] = weight.detach() + adapter.delta()
    assert len(adapters) >= 6
    merge(adapters, folder, tmp_path / "merged", task=task_settings(model), show_progress=False)
    again = dict(type(model).from_pretrained(tmp_path / "merged").named_parameters())
    for name, parameter in model.named_parameters():
        if name in names.sources:
            torch.testing.assert_close(again[name], expected.get(name, parameter.detach()))


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_are_refused_and_the_rest_is_not(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    write(EXPERTS[kind](), tmp_path / "base")
    names, model, report = names_and_model(tmp_path / "base", CAUSAL)
    assert not names.missing and not report["missing_keys"]
    parameters = dict(model.named_parameters())
    assert names.computed == {name for name in parameters if name.endswith(("gate_up_proj", "down_proj"))}
    expert = min(names.computed)
    line = refusal(names.places, {}, [expert], tmp_path)
    assert expert in line and "experts.0." in line and "train_modules" in line
    # Routers, attention and dense layers have one tensor each, whatever it is called.
    others = [name for name in parameters if name not in names.computed]
    places, added = names.places({}, others, tmp_path)
    assert sorted(places.values()) == sorted(others) and not added
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    assert all(torch.equal(tensors[key], parameters[name]) for key, name in places.items())


def test_a_head_of_another_size_is_new_and_replaced(tmp_path: Path) -> None:
    """RTE, with two labels, from a model for MNLI, with three."""
    torch.manual_seed(0)
    write(tf.BertForSequenceClassification(tf.BertConfig(**ENCODER, num_labels=3)), tmp_path / "base")
    names, model, _ = names_and_model(tmp_path / "base", CLASSIFIER, num_labels=2)
    assert names.mismatched == {"classifier.weight": (3, 16), "classifier.bias": (3,)}
    assert set(names.missing) == names.mismatched.keys()
    trained = {n: torch.ones_like(p) for n, p in model.named_parameters() if n in names.missing}
    merge([], tmp_path / "base", tmp_path / "merged", trained=trained, task=task_settings(model), show_progress=False)
    again = CLASSIFIER.from_pretrained(tmp_path / "merged")
    assert torch.equal(again.classifier.weight, torch.ones(2, 16)) and again.config.num_labels == 2


def test_of_two_spellings_the_loaded_one_is_replaced(tmp_path: Path) -> None:
    """A folder that has both, as earlier merges left them."""
    torch.manual_seed(0)
    write(tf.BertForMaskedLM(tf.BertConfig(**ENCODER)), tmp_path / "base", OLD)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    stale = {n.replace("gamma", "weight"): torch.full_like(t, 7) for n, t in tensors.items() if n.endswith("gamma")}
    save_file(tensors | stale, file, {"format": "pt"})
    names, model, _ = names_and_model(tmp_path / "base", CLASSIFIER)
    norm = "bert.embeddings.LayerNorm.weight"
    assert torch.equal(model.get_parameter(norm), tensors[names.sources[norm][0].key])
    merge(
        [], tmp_path / "base", tmp_path / "merged", trained={norm: torch.full((16,), 3.0)}, task=task_settings(model),
        show_progress=False,
    )  # fmt: skip
    again = CLASSIFIER.from_pretrained(tmp_path / "merged")
    assert torch.equal(again.get_parameter(norm), torch.full((16,), 3.0))


def test_new_modules_of_the_backbone() -> None:
    """A pooler is trained with the head. What lacks a layer, its embeddings or its last norm is an incomplete model."""

    def new(model: Any, *missing: str) -> list[str]:
        names = [n for n, _ in model.named_parameters() if n.startswith(missing)]
        model.file_names = FileNames("", {}, frozenset(), tuple(names), {}, ())
        return new_backbone_modules(model)

    bert = tf.BertForSequenceClassification(tf.BertConfig(**ENCODER))
    assert new(bert, "bert.pooler", "classifier") == ["bert.pooler"]
    assert new(bert, "bert.pooler.dense.bias") == []  # half of it
    assert new(bert, "bert.encoder.layer.1") == new(bert, "bert.embeddings") == new(bert, "bert.encoder") == []
    llama = tf.LlamaForSequenceClassification(tf.LlamaConfig(**DECODER))
    assert new(llama, "model.norm", "score") == new(llama, "model.embed_tokens") == []
    assert new_backbone_modules(tf.BertModel(tf.BertConfig(**ENCODER))) == []


def test_a_class_that_transformers_does_not_have(tmp_path: Path) -> None:
    """Code from a repository is not run for a merge: names count as they are, and nothing is added on a guess."""
    torch.manual_seed(0)
    write(tf.BertModel(tf.BertConfig(**ENCODER)), tmp_path)
    names = names_in(tmp_path, {"architectures": ["BertOfTheirOwn"]})
    places, added = names.places({"pooler.dense.weight": (16, 16)}, ["pooler.dense.bias"], tmp_path)
    assert places == {"pooler.dense.weight": "pooler.dense.weight", "pooler.dense.bias": "pooler.dense.bias"}
    assert not added
    assert "bert.pooler.dense.weight" in refusal(names.places, {"bert.pooler.dense.weight": (16, 16)}, [], tmp_path)
    assert "lack classifier.weight" in refusal(names.places, {}, ["classifier.weight"], tmp_path)


def test_a_folder_whose_configuration_is_of_another_model(tmp_path: Path) -> None:
    write(tf.BertModel(tf.BertConfig(**ENCODER)), tmp_path)
    line = refusal(names_in, tmp_path, {"architectures": ["GPT2LMHeadModel"]})
    assert str(tmp_path) in line and "GPT2LMHeadModel" in line
