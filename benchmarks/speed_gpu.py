"""The GPU part of speed.py: LLaMA-7B shapes, r = 12 -> 8 on all linear maps, random weights in bf16 and NF4."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
from torch import nn
from variants import NAMES, Variant

from adalora_dist.importance import update_averages

SHAPE = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000)
SCHEDULE = (100_000, 10, 10, 100)  # far from its end: all ranks stay 12


def device_seconds(action: Callable[[], None], rounds: int = 10, warmup: int = 3) -> float:
    """Median over rounds, by device events."""
    times = []
    for round_ in range(-warmup, rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        stop.record()
        stop.synchronize()
        if round_ >= 0:
            times.append(start.elapsed_time(stop) / 1000)
    return statistics.median(times)


def llama_7b(quantization: str) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
        torch.set_default_dtype(torch.float32)
    if quantization == "nf4":
        import bitsandbytes as bnb

        for name, module in list(model.model.named_modules()):
            if isinstance(module, nn.Linear):
                packed = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                packed.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                model.model.set_submodule(name, packed.cuda())
    return model


def gpu() -> None:
    if not torch.cuda.is_available():
        sys.exit("error: benchmark gpu needs a CUDA device, and there is none: the others run on CPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| backbone | tokens | method | seconds | tokens/s | step / our LoRA's |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    for quantization in ("bf16", "nf4"):
        for tokens in (8192, 2048):
            batch = torch.randint(32000, (tokens // 1024, 1024), device="cuda")
            seconds = {}
            for method in ("lora", "adalora", "peft-lora", "peft-adalora"):  # one model at a time: memory
                variant = Variant(method, llama_7b(quantization), 12, 8, SCHEDULE)
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    seconds[method] = device_seconds(lambda v=variant, b=batch: v.step(b))
                del variant
                torch.cuda.empty_cache()
                cells = [f"{seconds[method]:.4f}", f"{tokens / seconds[method]:.0f}"]
                cells += [f"{seconds[method] / seconds['lora']:.3f}"]
                print(f"| {quantization} | {tokens} | {NAMES[method]} | " + " | ".join(cells) + " |", flush=True)
    vectors = [torch.rand(30_000_000, device="cuda") for _ in range(4)]
    update = device_seconds(lambda: update_averages(*vectors, 0.85, 0.85))
    compiled = torch.compile(update_averages, dynamic=False)
    fused = device_seconds(lambda: compiled(*vectors, 0.85, 0.85))
    copy = device_seconds(lambda: vectors[0].copy_(vectors[1]))  # one read, one write; the update: four and two
    print(f"\nimportance update, share of copy bandwidth: {3 * copy / update:.2f}; compiled: {3 * copy / fused:.2f}")
