"""What 4-bit and 8-bit backbones save on every engine, and what they cost in accuracy. On CPU, 2 processes.

    python benchmarks/quantization.py memory                                      bytes per process, a minute or two
    python benchmarks/quantization.py quality --seeds 1 2 RECIPE_FLAGS ...        full precision beside NF4

RECIPE_FLAGS are those of recipes/llama_commonsense.py; without any it is that recipe's demonstration. Dated results
lie beside this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DEMO_CONFIG = ROOT / "recipes" / "configs" / "llama_commonsense_demo.yaml"
HIDDEN, INTERMEDIATE, KEY_VALUE, LAYERS, VOCABULARY, RANK = 1024, 2816, 256, 2, 2048, 8
LINEAR_WEIGHTS = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEY_VALUE + 3 * HIDDEN * INTERMEDIATE)
METHODS = ("none", "int8", "nf4")
ENGINES = {"single": 1, "fsdp2": 2, "zero3": 2}


def launch(engine: str, script: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """A script under an engine, as users start it."""
    start = [sys.executable]
    if engine != "single":
        file = str(ROOT / "launch" / "accelerate" / f"{engine}.yaml")
        start += ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", str(ENGINES[engine])]
    return subprocess.run([*start, str(script), *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


# ---------------------------------------------------------------------------------------------------------- memory


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
                done = launch(engine, Path(__file__), ["hold", method, folder, str(result)])
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

    shape = dict(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
    heads = dict(num_attention_heads=8, num_key_value_heads=8 * KEY_VALUE // HIDDEN, tie_word_embeddings=False)
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).to(torch.bfloat16).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)


def hold(method: str, folder: str, result: str) -> None:
    """One process of one cell: one training step, then count. The largest of all processes is written."""
    from accelerate.utils import gather_object
    from transformers import AutoModelForCausalLM

    from adalora_dist.config import AdapterConfig, ModelConfig, QuantizationConfig, RunConfig, TrainConfig
    from adalora_dist.data.batches import BatchPlan
    from adalora_dist.inject import inject_adapters
    from adalora_dist.training.engine import build_accelerator, engine_name
    from adalora_dist.training.loop import prepare, train
    from adalora_dist.training.memory import held_bytes
    from adalora_dist.training.model import load_backbone
    from adalora_dist.training.quantization import bitsandbytes_config
    from adalora_dist.training.run_folder import RunFolder

    settings = dict(
        output_dir=f"{result}.run", max_steps=3, batch_size=2, micro_batch_size=2, precision="bf16"
    )  # as on GPUs
    config = RunConfig(
        model=ModelConfig(name=folder),
        adapter=AdapterConfig(
            init_rank=RANK, target_rank=4, initial_warmup_steps=1, final_steps=1, mask_interval_steps=1
        ),
        quantization=QuantizationConfig(quantization=method),
        train=TrainConfig(**settings),
    )
    accelerator = build_accelerator(config.train)
    quantization = bitsandbytes_config(config, engine_name(accelerator))
    model, _ = load_backbone(config.model, AutoModelForCausalLM, quantization)
    inject_adapters(model, config.adapter)
    prepared = prepare(accelerator, model, config, num_steps=3)
    rows: list[Any] = [{"input_ids": list(range(k, k + 8)), "labels": list(range(k, k + 8))} for k in range(2)]
    folder_of_run = RunFolder(config, accelerator.is_main_process, {})
    train(
        accelerator, prepared, rows, BatchPlan.of_rows(rows, 2, 0, False), 0, config, folder_of_run, lambda line: None
    )
    held = gather_object([held_bytes(prepared)])
    if accelerator.is_main_process:
        Path(result).write_text(json.dumps(max(held, key=lambda h: h["linear_bytes"])))
    accelerator.end_training()


# --------------------------------------------------------------------------------------------------------- quality


def quality(seeds: list[int], flags: list[str]) -> None:
    """Held-out accuracy of both, every seed with the same batches and initial adapters; and of what NF4 exports."""
    from adalora_dist.cli import parse_config
    from adalora_dist.config import CommonsenseConfig

    found: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        for method in ("none", "nf4"):
            with tempfile.TemporaryDirectory() as folder:
                run = ["--quantization", method, "--seed", str(seed), "--output-dir", f"{folder}/run"]
                config = parse_config(CommonsenseConfig, ["--config", str(DEMO_CONFIG), *flags, *run])
                for cell, value in _train_and_export(config, Path(folder)).items():
                    print(f"seed {seed}, {method}: {cell}: {value:.4g}", flush=True)
                    found.setdefault(cell, {}).setdefault(method, []).append(value)
    print(f"\n| mean (range) over seeds {seeds} | full precision | NF4 |\n| --- | ---: | ---: |")
    for cell, values in found.items():
        shown = [f"{statistics.mean(v):.4g} ({min(v):.4g} to {max(v):.4g})" if (v := values.get(m)) else ""
                 for m in ("none", "nf4")]  # fmt: skip
        print(f"| {cell} | " + " | ".join(shown) + " |")


def _train_and_export(config: Any, folder: Path) -> dict[str, float]:
    """One process: train as the recipe does, then load what was exported in plain transformers."""
    from transformers import AutoModelForCausalLM, set_seed

    from adalora_dist.data.batches import BatchPlan
    from adalora_dist.data.commonsense import load_tasks
    from adalora_dist.data.demo_model import demo_model_folder
    from adalora_dist.data.demo_questions import demo_questions_folder
    from adalora_dist.data.encoding import encode_examples, padding_token
    from adalora_dist.evaluation.choices import evaluate_choices
    from adalora_dist.export import base_folder_of, gather_adapters, merge
    from adalora_dist.inject import inject_adapters
    from adalora_dist.training.dequantized import quantized_weights
    from adalora_dist.training.engine import build_accelerator, engine_name
    from adalora_dist.training.loop import prepare, total_steps, train
    from adalora_dist.training.model import load_backbone
    from adalora_dist.training.quantization import bitsandbytes_config
    from adalora_dist.training.run_folder import RunFolder
    from adalora_dist.training.verify import last_logits, logit_differences

    accelerator = build_accelerator(config.train)
    set_seed(config.train.seed)
    data = config.data.model_copy(update={"source": config.data.source or str(demo_questions_folder())})
    backbone = config.model.model_copy(update={"name": config.model.name or str(demo_model_folder())})
    train_examples, eval_examples = load_tasks(data)
    quantization = bitsandbytes_config(config, engine_name(accelerator))
    model, tokenizer = load_backbone(backbone, AutoModelForCausalLM, quantization)
    rows = encode_examples(train_examples, tokenizer, data.max_length, data.train_on)
    plan = BatchPlan.of_rows(rows, config.train.batch_size, config.train.seed, config.train.group_by_length)
    inject_adapters(model, config.adapter, config.train.seed)
    prepared = prepare(accelerator, model, config, total_steps(config.train, plan))

    def accuracies(evaluated: Any, what: str) -> dict[str, float]:
        results = [
            evaluate_choices(evaluated, tokenizer, examples, config.evaluation.eval_batch_size, data.max_length)
            for examples in eval_examples.values()
        ]
        return {f"{what}: accuracy on {r.task}, {r.num_rows} rows": r.accuracy for r in results}

    run_folder = RunFolder(config, True, {})
    losses = train(accelerator, prepared, rows, plan, padding_token(tokenizer), config, run_folder, lambda line: None)
    unwrapped = accelerator.unwrap_model(prepared.model)
    found = {"training loss, mean of the last 10 steps": statistics.mean(losses[-10:])}
    found |= accuracies(unwrapped, "trained")
    if quantization is not None:
        probe = rows[0]["input_ids"]
        logits = last_logits(unwrapped, probe, len(probe), accelerator.device)
        adapters, base = gather_adapters(prepared.allocator), base_folder_of(backbone.name, backbone.revision)
        for into, weights in (("original", None), ("dequantised", quantized_weights(unwrapped, config))):
            merge(adapters, base, folder / into, base_weights=weights, show_progress=False)
            difference = logit_differences(AutoModelForCausalLM, folder / into, probe, logits)
            found |= {f"merged into {into}: {k} logit difference": v for k, v in difference._asdict().items()}
            found |= accuracies(AutoModelForCausalLM.from_pretrained(folder / into), f"merged into {into}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "quality", "hold"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments, rest = parser.parse_known_args()
    if arguments.what == "memory":
        memory()
    elif arguments.what == "quality":
        quality(arguments.seeds, rest)
    else:
        from adalora_dist.cli import user_errors

        with user_errors():
            hold(*rest)


if __name__ == "__main__":
    main()
