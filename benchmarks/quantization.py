"""What 4-bit and 8-bit backbones save on every engine: bytes per process. On CPU, 2 processes, a minute or two.

    python benchmarks/quantization.py

Dated results lie beside this file; what the backbones cost in accuracy is measured by the recipes' own commands.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HIDDEN, INTERMEDIATE, KEY_VALUE, LAYERS, VOCABULARY, RANK = 1024, 2816, 256, 2, 2048, 8
LINEAR_WEIGHTS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEY_VALUE + 3 * HIDDEN * INTERMEDIATE)
METHODS = ("none", "int8", "fp8", "nf4")
ENGINES = {"single": 1, "fsdp2": 2, "zero3": 2}


def launch(engine: str, script: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """A script under an engine, as users start it."""
    start = [sys.executable]
    if engine != "single":
        file = str(ROOT / "launch" / "accelerate" / f"{engine}.yaml")
        start += ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", str(ENGINES[engine])]
    return subprocess.run([*start, str(script), *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def memory() -> None:
    with tempfile.TemporaryDirectory() as folder:
        _write_model(Path(folder))
        bf16_bytes = 2 * LINEAR_WEIGHTS
        print(f"{LINEAR_WEIGHTS:,} weights in frozen linear maps, bf16: {bf16_bytes / 1e6:.1f} MB\n")
        print("| engine | backbone | linear maps, MB | of bf16 / processes | embeddings, norms, head | adapters | "
              "optimizer | importance |")  # fmt: skip
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for engine, world_size in ENGINES.items():
            for method in METHODS:
                result = Path(folder, f"{engine}-{method}.json")
                done = launch(engine, Path(__file__), [method, folder, str(result)])
                name = f"| {engine} x {world_size} | {method} | "
                if not result.exists():
                    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
                    if not lines:
                        raise RuntimeError(done.stderr)
                    print(f"{name}refused: {lines[0].removeprefix('error: ')} | | | | | |", flush=True)
                    continue
                held = json.loads(result.read_text())
                share = held["linear_bytes"] / (bf16_bytes / world_size)
                others = [f"{held[k] / 1e6:.2f}" for k in ("other_bytes", "adapter_bytes", "optimizer_bytes")]
                cells = [f"{held['linear_bytes'] / 1e6:.2f}", f"{share:.3f}", *others]
                print(name + " | ".join([*cells, f"{held['importance_bytes'] / 1e6:.2f}"]) + " |", flush=True)


def _write_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape: dict[str, Any] = dict(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, vocab_size=VOCABULARY
    )
    heads: dict[str, Any] = dict(
        num_attention_heads=8, num_key_value_heads=8 * KEY_VALUE // HIDDEN, tie_word_embeddings=False
    )
    model: Any = LlamaForCausalLM(LlamaConfig(**shape, **heads))
    model.to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)


def hold(method: str, folder: str, result: str) -> None:
    """One process of one cell: one training step, then count. The largest of all processes is written."""
    from accelerate.utils import gather_object
    from transformers import AutoModelForCausalLM

    from adalora_dist.backbones.load import load_backbone
    from adalora_dist.backbones.quantization import quantization_of
    from adalora_dist.config.methods import AdaLoraConfig
    from adalora_dist.config.sections import ModelConfig, QuantizationConfig, RunConfig, TrainConfig
    from adalora_dist.methods.inject import adapt
    from adalora_dist.tasks.batches import BatchPlan
    from adalora_dist.tasks.losses import causal_loss
    from adalora_dist.training.engine import build_accelerator, engine_name
    from adalora_dist.training.faults.memory import held_bytes
    from adalora_dist.training.loop import train
    from adalora_dist.training.prepared import prepare
    from adalora_dist.training.run_folder import RunFolder

    settings = dict(output_dir=f"{result}.run", max_steps=3, batch_size=2, micro_batch_size=2, precision="bf16")
    config = RunConfig(
        model=ModelConfig(name=folder),
        adapter=AdaLoraConfig(
            init_rank=RANK, target_rank=4, initial_warmup_steps=1, final_steps=1, mask_interval_steps=1, compact=False
        ),
        quantization=QuantizationConfig(quantization=method),
        train=TrainConfig(**settings),
    )
    accelerator = build_accelerator(config.train)
    quantization = quantization_of(config, engine_name(accelerator))
    model, _ = load_backbone(config.model, AutoModelForCausalLM, quantization)
    adapt(model, config.adapter)
    prepared = prepare(accelerator, model, config, num_steps=3)
    rows: list[Any] = [{"input_ids": list(range(k, k + 8)), "labels": list(range(k, k + 8))} for k in range(2)]
    folder_of_run = RunFolder(config, accelerator.is_main_process, {})
    loss_sum = causal_loss(rows, 0, accelerator.device)
    plan = BatchPlan.of_rows(rows, 2, 0, False)
    train(accelerator, prepared, plan, loss_sum, config, folder_of_run, lambda line: None)
    held = gather_object([held_bytes(prepared)])
    if accelerator.is_main_process:
        Path(result).write_text(json.dumps(max(held, key=lambda h: h["linear_bytes"])))
    accelerator.end_training()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", nargs="*", help="METHOD MODEL RESULT: one process of one cell, by itself")
    if cell := parser.parse_args().cell:
        from adalora_dist.config.flags import user_errors

        with user_errors():
            hold(*cell)
    else:
        memory()


if __name__ == "__main__":
    main()
