"""Stacks of experts that no process holds: FSDP2 reads the rows of its experts from the files' tensors of each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    JetMoeConfig,
    JetMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3VLMoeForConditionalGeneration,
)

from adalora_dist.backbones.expert_files import parts_of
from adalora_dist.backbones.experts import stacks_of
from adalora_dist.backbones.files import stored_tensors
from adalora_dist.backbones.load import load_backbone
from adalora_dist.backbones.names import FileNames
from adalora_dist.backbones.quantization import Quantization
from adalora_dist.backbones.sharded_load import _read
from adalora_dist.config.sections import ModelConfig
from tests.support.paths import ROOT
from tests.support.ranks import import_deepspeed, run_ranks
from tests.support.refusals import refusal
from tests.support.sharded_loads import VOCABULARY, peak_of_loading, run_with
from tests.support.tiny_any import tiny_model
from tests.support.tiny_language_model import byte_tokenizer

import_deepspeed()  # or skip


def save_mixtral(rank: int, world_size: int, folder: Path, hidden_size: int, num_layers: int, num_experts: int) -> int:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=hidden_size, intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers, num_attention_heads=4, num_key_value_heads=2, num_local_experts=num_experts,
        num_experts_per_tok=2, initializer_range=0.2, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="20MB" if num_layers > 2 else "20KB")
    byte_tokenizer().save_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_experts_arrive_by_rows_and_learn_as_on_one_process(world_size, tmp_path):
    """Three experts on two ranks: one of them holds two. The files have a tensor for each, spread over several."""
    run_ranks(1, save_mixtral, tmp_path, 16, 2, 3)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    [expected] = run_ranks(1, run_with, "single", tmp_path, AutoModelForCausalLM, {})
    ranks = run_ranks(world_size, run_with, "fsdp2", tmp_path, AutoModelForCausalLM, {})
    for result in ranks:
        torch.testing.assert_close(result["logits"], expected["logits"], rtol=0, atol=5e-5)
        assert result["patterns"] == expected["patterns"]
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=1e-5, atol=0)
        assert result["loaded_bytes"] == 0
        assert result["held_bytes"] <= expected["held_bytes"] / world_size + result["row_bytes"]
        # At no time more than what is left in the end, and one stack of experts.
        assert result["peak_bytes"] <= result["held_bytes"] + result["trained_bytes"] + result["largest_bytes"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux' /proc")
def test_no_rank_ever_holds_the_experts(tmp_path):
    command = [sys.executable, "-m", "tests.backbones.test_expert_load", str(tmp_path)]
    measured = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert measured.returncode == 0, measured.stderr
    full_bytes, peaks = json.loads(measured.stdout.splitlines()[-1])
    assert full_bytes > 100e6
    # A third, and what loading needs besides: the tensor in hand, adapters, Python modules.
    assert max(peaks) < 0.5 * full_bytes, (full_bytes, peaks)


def read_turned(rank: int, world_size: int, folder: Path) -> None:
    """Of a stack whose matrices lie the other way round in its file, a process reads those of its own experts."""
    with torch.device("meta"):
        model = Qwen3VLMoeForConditionalGeneration(AutoConfig.from_pretrained(folder))
    file = folder / "model.safetensors"
    stack, *_ = stacks_of(model)
    parts = parts_of(FileNames.of(model, stored_tensors([file])), stack)
    expected = load_file(file)[stack.name].mT
    mesh = init_device_mesh("cpu", (world_size,))
    read = distribute_tensor(torch.zeros(expected.shape), mesh, [Shard(0)])
    _read([(read, parts)])
    assert torch.equal(read.to_local(), expected.tensor_split(world_size)[rank]) and parts[0].is_turned


def test_experts_that_lie_the_other_way_round_are_read_by_rows(tmp_path):
    tiny_model(Qwen3VLMoeForConditionalGeneration).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    turned = {key: x.mT.contiguous() if ".experts." in key else x for key, x in tensors.items()}
    save_file(turned, tmp_path / "model.safetensors", metadata={"format": "pt"})
    run_ranks(2, read_turned, tmp_path)


def jetmoe(folder: Path) -> str:
    config = JetMoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1, kv_channels=8,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    JetMoeForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return "model.layers.0.mlp.input_linear.weight"


def test_experts_that_would_stay_at_full_size_in_a_quantised_model_are_refused_by_name(tmp_path):
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    save_mixtral(0, 1, tmp_path / "stacks", 32, 1, 2)
    names = {"stacks": "model.layers.0.mlp.experts.gate_up_proj", "jetmoe": jetmoe(tmp_path / "jetmoe")}
    settings = BitsAndBytesConfig(load_in_4bit=True)
    for kind, name in names.items():
        model = ModelConfig(name=str(tmp_path / kind))
        line = refusal(load_backbone, model, AutoModelForCausalLM, Quantization(settings, torch.float32))
        assert name in line and "quantisation leaves as they are: leave quantization at none" in line
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / kind, quantization_config=settings)
        assert loaded.get_parameter(name).is_floating_point() and loaded.get_parameter(name).dim() == 3
        # What bitsandbytes has for such parameters: the whole of one, in full size, whenever it is read.
        owner, _, leaf = name.rpartition(".")
        module, shape = loaded.get_submodule(owner), loaded.get_parameter(name).shape
        parametrize.replace_parameter_4bit(module, leaf)
        assert getattr(module, leaf).shape == shape and getattr(module, leaf).is_floating_point()


if __name__ == "__main__":
    where = Path(sys.argv[1])
    [num_bytes] = run_ranks(1, save_mixtral, where, 416, 4, 6)
    print(json.dumps([num_bytes, run_ranks(3, peak_of_loading, "fsdp2", where)]))
