"""Backbones that no process holds: FSDP2 reads rows, ZeRO-3 partitions while it builds. Real ranks, real files."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    HrmTextConfig,
    HrmTextForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from adalora_dist.io.errors import UserError
from tests.support.paths import ROOT
from tests.support.ranks import import_deepspeed, run_ranks
from tests.support.sharded_loads import VOCABULARY, peak_of_loading, run, run_with
from tests.support.tiny_language_model import byte_tokenizer

deepspeed = import_deepspeed()


def llama(hidden_size: int = 24, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    values = dict(
        vocab_size=VOCABULARY, hidden_size=hidden_size, intermediate_size=2 * hidden_size + 1, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**values, **changes}))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=20, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> dict[str, Path]:
    """Folders as save_pretrained writes them: several files, tied embeddings, a base model without its prefix."""
    base = tmp_path_factory.mktemp("backbones")
    llama(tie_word_embeddings=False).save_pretrained(base / "untied", max_shard_size="20KB")
    llama(tie_word_embeddings=True).save_pretrained(base / "tied")
    llama(tie_word_embeddings=True).bfloat16().save_pretrained(base / "bfloat16")
    gpt2().transformer.save_pretrained(base / "gpt2")
    # transformers cuts a tensor of these files into several.
    cut = HrmTextConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, num_layers_per_stack=1,
    )  # fmt: skip
    HrmTextForCausalLM(cut).save_pretrained(base / "cut")
    # The same tied tensor, under the other of its names.
    llama(tie_word_embeddings=True).save_pretrained(base / "tied to the head")
    file = base / "tied to the head" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    # Both of its names, as others' merged models have them: with the same values they are tied, else they are not.
    for kind, difference in (("twice", 0.0), ("not tied after all", 0.01)):
        llama(tie_word_embeddings=True).save_pretrained(base / kind)
        tensors = load_file(base / kind / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + difference
        save_file(tensors, base / kind / "model.safetensors", metadata={"format": "pt"})
    for folder in base.iterdir():
        byte_tokenizer().save_pretrained(folder)
    assert len(list((base / "untied").glob("*.safetensors"))) > 2
    return {folder.name: folder for folder in base.iterdir()}


@lru_cache
def control(folder: Path, auto_class: type = AutoModelForCausalLM, **changes: Any) -> dict[str, Any]:
    return run_ranks(1, run_with, "single", folder, auto_class, changes)[0]


CASES = [
    ("fsdp2", 2, "untied"),
    ("fsdp2", 3, "untied"),
    ("fsdp2", 3, "tied to the head"),
    ("fsdp2", 2, "twice"),
    pytest.param("fsdp2", 2, "not tied after all", marks=pytest.mark.slow),
    pytest.param("zero3", 2, "twice", marks=pytest.mark.slow),
    ("fsdp2", 2, "gpt2"),
    ("fsdp2", 2, "cut"),
    ("fsdp2 ram-efficient", 2, "tied"),
    ("zero3", 2, "untied"),
    ("zero3", 3, "tied"),
]


@pytest.mark.parametrize(("engine", "world_size", "name"), CASES)
def test_same_logits_and_patterns_as_one_process_from_a_share_of_the_bytes(backbones, engine, world_size, name):
    expected = control(backbones[name])
    assert sum(list(expected["patterns"].values())[-1]) < sum(list(expected["patterns"].values())[0])
    ranks = run_ranks(world_size, run_with, engine, backbones[name], AutoModelForCausalLM, {})
    for result in ranks:
        assert torch.equal(result["logits"], expected["logits"])
        assert result["patterns"] == expected["patterns"]
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=1e-5, atol=0)
        assert result["training"] == expected["training"]
        assert result["loaded_bytes"] == 0
        slack = result["row_bytes"] if engine != "zero3" else 4 * result["num_frozen"]
        assert result["held_bytes"] <= expected["held_bytes"] / world_size + slack
    assert sum(r["held_bytes"] for r in ranks) >= expected["held_bytes"]


def test_values_arrive_in_the_type_of_the_files(backbones):
    ranks = run_ranks(2, run_with, "fsdp2", backbones["bfloat16"], AutoModelForCausalLM, {})
    expected = control(backbones["bfloat16"])
    assert ranks[0]["dtype"] == "torch.bfloat16"
    assert torch.equal(ranks[0]["logits"], expected["logits"])


def test_modules_trained_in_full(backbones):
    """The head is in the files and trained: its values are there before the optimizer is."""
    whole, read = (
        run_ranks(2, run_with, engine, backbones["untied"], AutoModelForCausalLM, {"train_modules": ("lm_head",)})
        for engine in ("fsdp2 whole", "fsdp2")
    )
    for a, b in zip(whole, read, strict=True):
        assert torch.equal(a["logits"], b["logits"])
        assert a["losses"] == b["losses"] and a["patterns"] == b["patterns"]


def test_a_new_classifier_starts_with_the_same_values(backbones):
    changes = {"train_modules": ("score",)}
    expected = control(backbones["tied"], AutoModelForSequenceClassification, **changes)
    ranks = run_ranks(2, run_with, "fsdp2", backbones["tied"], AutoModelForSequenceClassification, changes)
    assert torch.equal(ranks[0]["logits"], expected["logits"])
    assert ranks[1]["logits"].abs().max() > 0


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
@pytest.mark.parametrize("kind", ["no pooler", "three labels"])
def test_new_parts_of_an_encoder_are_new_on_every_engine(engine, kind, tmp_path):
    """Files without the pooler, with old spellings; and a head for three classes where there are two."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForMaskedLM(config) if kind == "no pooler" else BertForSequenceClassification(config)
    config.num_labels = 2
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    byte_tokenizer().save_pretrained(tmp_path)
    changes = {"train_modules": ("task-head",)}
    expected = control(tmp_path, AutoModelForSequenceClassification, **changes)
    assert expected["logits"].shape == (1, 2)
    ranks = run_ranks(2, run_with, engine, tmp_path, AutoModelForSequenceClassification, changes)
    torch.testing.assert_close(ranks[0]["logits"], expected["logits"])
    assert torch.equal(ranks[0]["logits"], ranks[1]["logits"])
    for where in ("single", engine):
        [message, *_] = run_ranks(1 + (where == engine), refusal, tmp_path, AutoModelForSequenceClassification, where)
        new = "bert.pooler.dense" if kind == "no pooler" else "classifier.weight"
        assert "frozen parameters" in message and new in message


def refusal(rank: int, world_size: int, folder: Path, auto_class: type, engine: str = "fsdp2") -> str:
    with pytest.raises(UserError) as error:
        run(rank, world_size, engine, folder, folder / "refused", auto_class)
    return str(error.value)


def test_files_that_do_not_fit_are_refused(backbones, tmp_path):
    # The classifier is new, and nothing would train it.
    [message, _] = run_ranks(2, refusal, backbones["tied"], AutoModelForSequenceClassification)
    assert "lack 1 frozen parameters (score.weight)" in message and "train_modules" in message

    # A projection with a bias, in the files of a model whose configuration has none.
    model = llama()
    model.config.attention_bias = False
    model.save_pretrained(tmp_path / "bias")
    byte_tokenizer().save_pretrained(tmp_path / "bias")
    [message, _] = run_ranks(2, refusal, tmp_path / "bias", AutoModelForCausalLM)
    assert "8 tensors that LlamaForCausalLM has no place for" in message and "q_proj.bias" in message


def test_what_zero3_would_tie_and_others_do_not_is_refused(backbones):
    [message] = run_ranks(1, refusal, backbones["not tied after all"], AutoModelForCausalLM, "zero3")
    assert (
        "config.json ties lm_head.weight to model.embed_tokens.weight" in message and "tie_word_embeddings" in message
    )


def save_llama(rank: int, world_size: int, folder: Path, num_layers: int) -> int:
    model = llama(hidden_size=768, num_hidden_layers=num_layers)
    model.save_pretrained(folder, max_shard_size="30MB")
    byte_tokenizer().save_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux' /proc")
def test_no_rank_ever_holds_the_backbone(tmp_path):
    """Ranks are forked from a fresh process: in memory that earlier tests have freed, tensors would lie unseen."""
    command = [sys.executable, "-m", "tests.backbones.test_sharded_load", str(tmp_path)]
    measured = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert measured.returncode == 0, measured.stderr
    full_bytes, peaks = json.loads(measured.stdout.splitlines()[-1])
    assert full_bytes > 100e6 and peaks["single"][0] > 0.9 * full_bytes
    for engine in ("fsdp2", "zero3"):
        # A third, and what loading needs besides: the layer in hand, adapters, Python modules.
        assert max(peaks[engine]) < 0.5 * full_bytes, peaks


if __name__ == "__main__":
    where = Path(sys.argv[1])
    [num_bytes] = run_ranks(1, save_llama, where, 8)
    found = {e: run_ranks(w, peak_of_loading, e, where) for e, w in (("single", 1), ("fsdp2", 3), ("zero3", 3))}
    print(json.dumps([num_bytes, found]))
