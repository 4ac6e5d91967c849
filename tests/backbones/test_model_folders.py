"""Model folders as people have them: each works, or is refused in one line before anything is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    CanineModel,
    CanineTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from adalora_dist.artifacts.export import task_settings, with_task
from adalora_dist.backbones.load import load_backbone
from adalora_dist.config.methods import AdaLoraConfig
from adalora_dist.config.sections import ExportConfig, ModelConfig, RunConfig
from adalora_dist.methods.inject import adapt
from adalora_dist.tasks.glue.rows import TASKS
from adalora_dist.training.backbone_checks import check_backbone, refuse_own_layers
from adalora_dist.training.prepared import prepare
from tests.support.refusals import refusal
from tests.support.settings import adapter_section
from tests.support.tiny_any import tiny_model
from tests.support.tiny_encoders import encoder_tokenizer

TEXT: dict[str, Any] = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
BERT: dict[str, Any] = dict(
    vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip


def write(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    encoder_tokenizer().save_pretrained(folder)
    return folder


def llama(folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    return write(LlamaForCausalLM(LlamaConfig(**TEXT)), folder, **options)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return folder


def pickled(folder: Path) -> Path:
    torch.save(load_file(llama(folder) / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def gguf(folder: Path) -> Path:
    (llama(folder) / "model.safetensors").rename(folder / "model-q4.gguf")
    return folder


def flax(folder: Path) -> Path:
    (llama(folder) / "model.safetensors").rename(folder / "flax_model.msgpack")
    return folder


def without_index(folder: Path) -> Path:
    (llama(folder, max_shard_size="4KB") / "model.safetensors.index.json").unlink()
    return folder


def without_shard(folder: Path) -> Path:
    next(iter(sorted(llama(folder, max_shard_size="4KB").glob("*.safetensors")))).unlink()
    return folder


def cut_off(folder: Path) -> Path:
    file = llama(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def pointer(folder: Path) -> Path:
    """What git leaves where its large files have not been fetched."""
    (llama(folder) / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n")
    return folder


def dead_link(folder: Path) -> Path:
    file = llama(folder) / "model.safetensors"
    file.unlink()
    file.symlink_to("../../blobs/0123")
    return folder


def foreign_link(folder: Path) -> Path:
    llama(folder).joinpath("config.json").rename(folder.parent / "elsewhere.json")
    (folder / "config.json").symlink_to(folder.parent / "elsewhere.json")
    return folder


def snapshot(folder: Path) -> Path:
    """As the Hub's cache has it: every file is a link."""
    real, blobs = llama(folder.parent / "real"), folder / "blobs"
    place = folder / "snapshots" / "abc"
    shutil.copytree(real, blobs)
    place.mkdir(parents=True)
    for blob in blobs.iterdir():
        (place / blob.name).symlink_to(Path("../../blobs") / blob.name)
    return place


def without(prefix: str) -> Callable[[Path], Path]:
    return lambda folder: edit(llama(folder), lambda t: {k: v for k, v in t.items() if not k.startswith(prefix)})


def with_settings(name: str, content: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (llama(folder) / name).write_text(content)
        return folder

    return make


def with_values(name: str, **values: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        file = llama(folder) / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        return folder

    return make


def with_bias(folder: Path) -> Path:
    name = "model.layers.0.self_attn.q_proj.bias"
    return edit(llama(folder), lambda tensors: tensors | {name: torch.zeros(16)})


def other_vocabulary(folder: Path) -> Path:
    return with_values("config.json", vocab_size=70)(folder)


def run(folder: Path, auto_class: Any = AutoModelForCausalLM, num_labels: int = 0, **settings: Any) -> list[str]:
    """All that a run does with a model before it trains: the lines that it prints."""
    model_settings = {key: settings.pop(key) for key in ("allow_pickle_weights",) if key in settings}
    forms = settings.pop("export_formats", ("merged",))
    config = RunConfig(
        model=ModelConfig(name=str(folder), **model_settings),
        adapter=adapter_section(**{"init_rank": 2, "target_rank": 1, **settings}),
        export=ExportConfig(export_formats=forms),
    )
    model, _ = load_backbone(config.model, auto_class, changes={"num_labels": num_labels} if num_labels else None)
    adapt(model, config.adapter)
    lines = check_backbone(model, config)
    try:
        prepare(Accelerator(cpu=True), model, config, 20)
    finally:  # or ranks that later tests fork would take this one process for all there are
        AcceleratorState._reset_state(reset_partial_state=True)
    return lines


REFUSED: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "pickles alone": (pickled, "pytorch_model.bin", "allow_pickle_weights"),
    "gguf alone": (gguf, "model-q4.gguf", "safetensors"),
    "flax alone": (flax, "flax_model.msgpack", "save_pretrained"),
    "shards without their index": (without_index, "model-00001-of-", "index"),
    "an index without one of its shards": (without_shard, "model-00001-of-", "fetch"),
    "a file cut off": (cut_off, "model.safetensors", "fetch"),
    "a pointer in place of a file": (pointer, "model.safetensors", "fetch"),
    "a link to nothing": (dead_link, "link to nothing", "fetch"),
    "a link out of the folder": (foreign_link, "elsewhere.json", "put the file itself there"),
    "generation settings that are a list": (with_settings("generation_config.json", "[1]"), "object", "copy"),
    "generation settings that are no JSON": (with_settings("generation_config.json", "{1"), "JSON", "copy"),
    "settings that are a number": (with_settings("config.json", "3"), "object", "copy"),
    "a layer is missing": (without("model.layers.1."), "model.layers.1.", "train_modules"),
    "the embeddings are missing": (without("model.embed_tokens"), "model.embed_tokens.weight", "train_modules"),
    "the last norm is missing": (without("model.norm"), "model.norm.weight", "train_modules"),
    "the head is missing": (without("lm_head"), "lm_head.weight", "train_modules"),
    "a matrix to be adapted is missing": (
        without("model.layers.0.mlp.up_proj"), "model.layers.0.mlp.up_proj", "out of targets"
    ),
    "a tensor too many": (with_bias, "q_proj.bias", "config.json"),
    "another vocabulary in config.json": (other_vocabulary, "model.embed_tokens.weight", "config.json"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_before_training(kind: str, tmp_path: Path) -> None:
    make, what, remedy = REFUSED[kind]
    folder = make(tmp_path / "model")
    line = refusal(run, folder)
    assert what in line and remedy in line, line
    assert len(line) < 500


@pytest.mark.parametrize(("engine", "num_processes"), [("fsdp2", 2), ("zero3", 3)])
def test_layers_that_processes_would_leave_out_each_for_itself(engine: str, num_processes: int) -> None:
    """The others would wait for them for ever."""
    sizes = dict(vocab_size=40, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_layers=1, decoder_layers=1)
    model = BartForConditionalGeneration(BartConfig(**sizes, decoder_layerdrop=0.1))
    line = refusal(refuse_own_layers, model, engine, num_processes)
    assert line.startswith("the model's decoder_layerdrop is 0.1 (config.json): under ") and "set it to 0" in line
    for allowed in ((engine, 1), ("ddp", 2), ("zero2", 2)):
        refuse_own_layers(model, *allowed)
    refuse_own_layers(BartForConditionalGeneration(BartConfig(**sizes)), engine, num_processes)


def test_pickles_train_and_are_not_merged(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "model")
    assert run(folder, allow_pickle_weights=True, export_formats=("lora",)) == []


def test_pickles_without_a_layer_are_refused(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "model")
    file = folder / "pytorch_model.bin"
    torch.save({k: v for k, v in torch.load(file).items() if "layers.1" not in k}, file)
    assert "model.layers.1." in refusal(lambda: run(folder, allow_pickle_weights=True, export_formats=("lora",)))


def test_links_of_the_cache_work(tmp_path: Path) -> None:
    assert run(snapshot(tmp_path / "models--x")) == []


def test_layers_that_config_json_leaves_out_are_said(tmp_path: Path) -> None:
    folder = with_values("config.json", num_hidden_layers=1)(tmp_path / "model")
    [line] = run(folder)
    assert "not in the model" in line and line.endswith(": model.layers.1")


ODD: dict[str, dict[str, list[Any]]] = {
    "config.json": {
        "hidden_size": ["32", None, 0, -4], "num_attention_heads": [0, 3], "hidden_act": ["gelu2", 5],
        "rope_parameters": [5, [1], {"rope_type": "other"}], "dtype": ["float99", 7], "vocab_size": ["x"],
        "num_hidden_layers": [2.0], "pad_token_id": ["0", 10**9], "id2label": [[1], {"a": "b"}], "num_labels": ["x"],
        "quantization_config": [3, {}], "model_type": ["other", 7, None],
    },
    "generation_config.json": {"max_new_tokens": ["ten", 0], "watermarking_config": [3]},
    "tokenizer_config.json": {
        "pad_token": [5], "eos_token": [["a"]], "tokenizer_class": [5], "padding_side": ["middle"],
        "added_tokens_decoder": [{"x": 3}], "extra_special_tokens": [5], "model_input_names": [5],
        "model_max_length": ["x"],
    },
    "tokenizer.json": {"added_tokens": [5], "model": [{"type": "Other"}, None], "version": [3]},
}  # fmt: skip


@pytest.mark.parametrize("file", ODD)
def test_odd_values_are_refused_in_one_line(file: str, tmp_path: Path) -> None:
    """Whatever transformers and tokenizers raise for them."""
    folder = llama(tmp_path / "model")
    content = (folder / file).read_text()
    for name, values in ODD[file].items():
        for value in values:
            (folder / file).write_text(json.dumps(json.loads(content) | {name: value}))
            line = refusal(load_backbone, ModelConfig(name=str(folder)), AutoModelForCausalLM)
            assert str(folder) in line and len(line) < 600, (name, value, line)


def test_a_model_without_input_embeddings(tmp_path: Path) -> None:
    """It hashes characters, and transformers cannot say what they enter by."""
    torch.manual_seed(0)
    small = tiny_model(CanineModel, max_position_embeddings=64, num_hash_buckets=16)
    small.save_pretrained(tmp_path / "model")
    CanineTokenizer(model_max_length=64).save_pretrained(tmp_path / "model")
    [line] = run(tmp_path / "model", AutoModelForSequenceClassification, 2, train_modules=("task-head",))
    assert "classifier" in line


def test_a_head_named_in_train_modules_may_be_missing(tmp_path: Path) -> None:
    [line] = run(without("lm_head")(tmp_path / "model"), train_modules=("lm_head",))
    assert "lm_head" in line and "trained in full" in line


def test_an_encoder_without_its_pooler(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = write(BertForMaskedLM(BertConfig(**BERT)), tmp_path / "model")
    settings = {"auto_class": AutoModelForSequenceClassification, "num_labels": 2}
    [line] = run(folder, **settings, train_modules=("task-head",))
    assert "bert.pooler.dense" in line and "classifier" in line
    # Random and frozen it would be in use, so it needs a head that is trained, or its own name.
    assert "bert.pooler.dense" in refusal(lambda: run(folder, **settings, train_modules=("classifier",)))
    assert len(run(folder, **settings, train_modules=("classifier", "bert.pooler"))) == 1
    assert len(run(folder, **settings, method="full")) == 1
    adapted, _ = load_backbone(ModelConfig(name=str(folder)), AutoModelForSequenceClassification)
    names = [m.name for m in adapt(adapted, AdaLoraConfig(train_modules=("task-head",)))]
    assert len(names) == 12 and not any("pooler" in name for name in names)
    assert all(p.requires_grad for p in adapted.bert.pooler.parameters())


def test_another_head_may_be_in_the_files(tmp_path: Path) -> None:
    """BART as it is published has final_logits_bias, which belongs to no module, and no classifier."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    folder = write(BartForConditionalGeneration(config), tmp_path / "model")
    [line] = run(folder, AutoModelForSequenceClassification, 2, train_modules=("task-head",))
    assert "classification_head.dense, classification_head.out_proj" in line


def test_another_number_of_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = write(BertForSequenceClassification(BertConfig(**BERT, num_labels=3)), tmp_path / "model")
    settings = {"auto_class": AutoModelForSequenceClassification, "train_modules": ("task-head",)}
    assert run(folder, **settings, num_labels=3) == []
    [line] = run(folder, **settings, num_labels=2)
    assert "classifier (in the files 3 x 16)" in line
    assert "classifier.weight" in refusal(lambda: run(folder, **(settings | {"train_modules": ()}), num_labels=2))


NLI = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ({"num_labels": 1, "problem_type": "regression"}, False),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, False),
        ({"num_labels": 3}, False),
        ({"id2label": NLI, "label2id": {name: number for number, name in NLI.items()}}, True),
    ],
)
def test_what_the_files_say_of_their_task_gives_way(
    labels: dict[str, Any], told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Or pipelines would give the merged model's classes other names, and training it further another loss."""
    folder = write(BertForSequenceClassification(BertConfig(**BERT, **labels)), tmp_path / "model")
    settings = TASKS["mnli"].settings
    model, _ = load_backbone(ModelConfig(name=str(folder)), AutoModelForSequenceClassification, changes=settings)
    merged = with_task(json.loads((folder / "config.json").read_text()), task_settings(model))
    assert merged["problem_type"] == "single_label_classification"
    assert list(merged["id2label"].values()) == ["entailment", "neutral", "contradiction"]
    assert merged["label2id"] == {"entailment": 0, "neutral": 1, "contradiction": 2}
    said = [line for line in caplog.messages if "has the classes 0 CONTRADICTION, 1 NEUTRAL, 2 ENTAILMENT" in line]
    assert len(said) == told, caplog.messages


def test_experts_trained_in_full_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = write(MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=2)), tmp_path / "model")
    assert run(folder) == []  # attention alone
    for settings in ({"method": "full"}, {"train_modules": ("mlp.experts",)}):
        line = refusal(lambda settings=settings: run(folder, **settings))
        assert "experts" in line and "computed from" in line and "train_modules" in line
    assert run(folder, train_modules=("mlp.experts",), export_formats=("lora",)) == []


def test_a_model_in_four_bits_is_trained_and_not_merged(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    torch.manual_seed(0)
    wide = {**TEXT, "hidden_size": 64, "intermediate_size": 128}
    plain = write(LlamaForCausalLM(LlamaConfig(**wide)), tmp_path / "plain")
    four_bits = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings)
    folder = write(four_bits, tmp_path / "model")
    line = refusal(run, folder)
    assert "bitsandbytes" in line and "original" in line and "export_formats" in line
    assert run(folder, export_formats=("lora",)) == []
