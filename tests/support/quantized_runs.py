"""Tiny quantised LLaMAs under every engine, through the functions that recipes call. For ``run_ranks``."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adalora_dist.backbones.dequantized import QuantizedWeight, quantized_weights
from adalora_dist.backbones.load import load_backbone
from adalora_dist.backbones.quantization import quantization_of, quantized_linears
from adalora_dist.config.methods import AdaLoraConfig, MethodConfig
from adalora_dist.config.sections import ModelConfig, QuantizationConfig, RunConfig, TrainConfig
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.update import AdapterWeights
from adalora_dist.tasks.batches import BatchPlan, collate
from adalora_dist.tasks.evaluation.batches import evaluating
from adalora_dist.tasks.losses import causal_loss
from adalora_dist.training.engine import build_accelerator, engine_name
from adalora_dist.training.faults.memory import held_bytes
from adalora_dist.training.loop import train
from adalora_dist.training.prepared import prepare
from adalora_dist.training.run_folder import RunFolder
from tests.support.paths import DS_CONFIGS
from tests.support.ranks import import_deepspeed
from tests.support.tiny_language_model import byte_tokenizer

deepspeed = import_deepspeed()

STEPS, GLOBAL_BATCH, VOCABULARY = 12, 6, 259
PROBE = [5, 80, 33, 200, 14, 101]
ADAPTER = AdaLoraConfig(
    init_rank=3, target_rank=1.5, alpha=6, start="paper", init="orthonormal", initial_warmup_steps=2, final_steps=3,
    mask_interval_steps=1,
)  # fmt: skip


needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="no torchao: pip install 'adalora-dist[fp8]'")


def of_methods(*methods: str) -> list[Any]:
    """Parameters of a test, of which float8 is skipped where torchao is missing."""
    return [pytest.param(method, marks=[needs_torchao] if method == "fp8" else []) for method in methods]


@dataclass(frozen=True)
class Case:
    engine: str = "single"
    method: str = "nf4"
    precision: str = "fp32"
    storage: str = "auto"
    gradient_checkpointing: bool = False
    evaluate_first: bool = False
    keep_small: bool = False
    """ZeRO-3 with its default of keeping small parameters whole, which would hide whether anything is sharded."""
    compact: bool = True
    adapter: MethodConfig = ADAPTER

    @property
    def world_size(self) -> int:
        return 1 if self.engine == "single" else 2


def environment(engine: str) -> dict[str, str]:
    """What ``accelerate launch`` sets for the project's own configuration files."""
    if engine == "fsdp2":
        return {
            "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        }  # fmt: skip
    if engine.startswith("zero"):
        return {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(engine == "zero3").lower(),
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(DS_CONFIGS / f"{engine}.json"),
        }
    return {}


def write_llama(folder: Path, hidden_size: int = 64, intermediate_size: int = 128, **changes: Any) -> Path:
    """Two layers and a tokenizer, as save_pretrained writes them."""
    torch.manual_seed(0)
    values = dict(
        vocab_size=VOCABULARY, hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1, max_position_embeddings=64,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**values, **changes})).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def example_rows() -> list[dict[str, list[int]]]:
    sequences = [[3 + (k + 7 * i * (1 + k % 3)) % 30 for i in range(5 + k % 4)] for k in range(3 * GLOBAL_BATCH)]
    return [{"input_ids": ids, "labels": ids} for ids in sequences]


def configuration(case: Case, model: Path, output: str) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name=str(model)),
        adapter=case.adapter.model_copy(update={"compact": case.compact} if case.adapter.adapts_ranks else {}),
        quantization=QuantizationConfig(quantization=case.method, quant_storage=case.storage),
        train=TrainConfig(
            output_dir=output, max_steps=STEPS, batch_size=GLOBAL_BATCH, micro_batch_size=GLOBAL_BATCH,
            learning_rate=5e-2, lr_warmup_ratio=0, precision=case.precision,
            gradient_checkpointing=case.gradient_checkpointing,
        ),
    )  # fmt: skip


@dataclass
class Trained:
    """What one rank saw; everything whole and on the CPU."""

    losses: list[float]
    patterns: dict[int, list[bool]]
    held: dict[str, int]
    adapters: list[AdapterWeights]
    base_weights: dict[str, QuantizedWeight]
    logits: torch.Tensor
    engine: str
    kept_bytes: int
    """What the quantised maps' part of the graph holds between forward and backward."""
    num_quantized: int


def run(rank: int, world_size: int, case: Case, folder: Path) -> Trained:
    """Load, inject, prepare, train, look."""
    with tempfile.TemporaryDirectory() as output:
        config = configuration(case, folder, output)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment(case.engine).items():
                patch.setenv(name, value)
            accelerator = build_accelerator(config.train)
        assert (accelerator.num_processes, engine_name(accelerator)) == (world_size, case.engine)
        if case.engine == "zero3" and not case.keep_small:
            zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            zero["stage3_param_persistence_threshold"] = 0
        torch.manual_seed(5)
        quantization = quantization_of(config, engine_name(accelerator))
        model, _ = load_backbone(config.model, AutoModelForCausalLM, quantization)
        adapt(model, config.adapter, seed=1)
        prepared = prepare(accelerator, model, config, STEPS)
        rows = example_rows()
        batch = collate(rows[:3], 0)
        unwrapped = accelerator.unwrap_model(prepared.model)
        if case.evaluate_first:
            with evaluating(unwrapped):
                unwrapped(input_ids=batch["input_ids"])
        plan = BatchPlan.of_rows(rows, GLOBAL_BATCH, 3, False)
        report, loss_sum = RunFolder(config, rank == 0, {}), causal_loss(rows, 0, accelerator.device)
        losses = train(accelerator, prepared, plan, loss_sum, config, report, lambda _: None)
        adapters = prepared.hooks.updates()
        held = held_bytes(prepared)
        with evaluating(unwrapped):
            logits = unwrapped(input_ids=torch.tensor([PROBE])).logits[0].float()
        prepared.model.train()
        kept = kept_bytes(prepared.model(input_ids=batch["input_ids"]).logits)
        allocations = getattr(prepared.hooks.method_step, "allocations", ())
        return Trained(
            losses, {a.step: a.keep.tolist() for a in allocations}, held, adapters,
            quantized_weights(model, config) if quantization else {}, logits, engine_name(accelerator), kept,
            sum(1 for _ in quantized_linears(model)),
        )  # fmt: skip


def kept_bytes(result: torch.Tensor) -> int:
    """Bytes of tensors that autograd functions written in Python hold outside of autograd's sight.

    But for P and lambda, the model's own, of which the function in layers.py knows.
    """
    storages: dict[int, int] = {}
    seen, stack = set(), [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        looked_at = hasattr(node, "__dict__") and "_Multiply" not in type(node).__name__
        for value in vars(node).values() if looked_at else ():
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, torch.Tensor):
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())
