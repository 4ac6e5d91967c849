"""The GPU part of speed.py: AdaLoRA and LoRA, ours and PEFT's, on models of the sizes that the recipes are for.

Random weights of the shipped architectures, in bf16 and, for LLaMA-7B, NF4; adapters on all linear maps of the
backbone. The four methods share one copy of the frozen weights and take turns, so ratios compare what ran side by side.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from variants import NAMES, TARGETS, Variant

from adalora_dist.methods.adalora.importance import update_averages

ARCHITECTURES = Path(__file__).resolve().parents[1] / "recipes" / "configs" / "architectures"
SCHEDULE = (100_000, 10, 10, 100)  # far from its end: selections are made, and take next to nothing
TINY = dict(
    hidden_size=32, pooler_hidden_size=32, d_model=32, intermediate_size=48, encoder_ffn_dim=48, decoder_ffn_dim=48,
    num_hidden_layers=2, encoder_layers=2, decoder_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=64,
)  # fmt: skip
"""Sizes with which all of this can be tried without a GPU."""


@dataclass(frozen=True)
class Case:
    """A backbone and a batch."""

    name: str
    architecture: str
    shape: tuple[int, int]
    """(rows, tokens of each)."""
    num_target_tokens: int = 0
    """Per row, of an encoder-decoder's targets."""
    quantization: str = "none"
    targets: tuple[str, ...] = TARGETS

    def tiny(self) -> Case:
        return replace(self, shape=(2, 16), num_target_tokens=min(self.num_target_tokens, 8))


BART = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
DEBERTA = ("query_proj", "key_proj", "value_proj", "output.dense", "intermediate.dense")
CASES = [
    Case("LLaMA-7B, bf16", "llama-7b", (8, 1024)),
    Case("LLaMA-7B, bf16", "llama-7b", (2, 1024)),
    Case("LLaMA-7B, NF4", "llama-7b", (8, 1024), quantization="nf4"),
    Case("LLaMA-7B, NF4", "llama-7b", (2, 1024), quantization="nf4"),
    Case("DeBERTaV3-base, bf16", "deberta-v3-base", (32, 128), targets=DEBERTA),
    Case("BART-large, bf16", "bart-large", (16, 512), num_target_tokens=64, targets=BART),
]
LONG = Case("Llama-3.1-8B, bf16", "Llama-3.1-8B", (2, 4096))


class Timer:
    """Seconds of an action: device events on a GPU, the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, action: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            started = time.perf_counter()
            action()
            return time.perf_counter() - started
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        stop.record()
        stop.synchronize()
        milliseconds: float = start.elapsed_time(stop)
        return milliseconds / 1000

    def median(self, action: Callable[[], Any], rounds: int = 10, warmup: int = 3) -> float:
        return statistics.median([self(action) for _ in range(warmup + rounds)][warmup:])


def backbone(case: Case, device: torch.device, tiny: bool) -> nn.Module:
    """Random weights on ``device``, frozen."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(ARCHITECTURES / f"{case.architecture}.json")
    if tiny:
        for name in TINY.keys() & config.to_dict().keys():
            setattr(config, name, TINY[name])
    kind: Any = {"bart": AutoModelForSeq2SeqLM, "deberta-v2": AutoModelForSequenceClassification}
    torch.manual_seed(0)
    with device:
        model: Any = kind.get(config.model_type, AutoModelForCausalLM).from_config(config, dtype=torch.bfloat16)
    if case.quantization == "nf4":
        from bitsandbytes.nn.modules import Linear4bit, Params4bit

        for name, module in list(model.model.named_modules()):
            if isinstance(module, nn.Linear):
                packed = Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                packed.weight = Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                model.model.set_submodule(name, packed.to(device))
    frozen: nn.Module = model.requires_grad_(False)
    return frozen


def batch_of(case: Case, model: Any, device: torch.device) -> dict[str, torch.Tensor]:
    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(3, model.config.vocab_size, shape, device=device)

    inputs = tokens(*case.shape)
    if case.num_target_tokens:
        return {"input_ids": inputs, "labels": tokens(case.shape[0], case.num_target_tokens)}
    if model.config.model_type == "deberta-v2":
        return {"input_ids": inputs, "labels": torch.arange(case.shape[0], device=device) % 2}
    return {"input_ids": inputs, "labels": inputs}


def variants_of(
    case: Case, device: torch.device, tiny: bool, methods: tuple[str, ...], rank: int, target: int
) -> tuple[dict[str, Variant], dict[str, torch.Tensor]]:
    """The methods over one copy of the frozen weights; a batch for all of them."""
    model = backbone(case, device, tiny)
    shared = {id(p): p for p in model.parameters()}
    variants = {
        method: Variant(method, copy.deepcopy(model, dict(shared)), rank, target, SCHEDULE, targets=case.targets)
        for method in methods
    }
    return variants, batch_of(case, model, device)


def compare(case: Case, timer: Timer, tiny: bool, rounds: int, warmup: int) -> list[str]:
    """One row of the table per method."""
    variants, batch = variants_of(case, timer.device, tiny, tuple(NAMES), 12, 8)
    seconds: dict[str, list[float]] = {method: [] for method in variants}
    for round_ in range(-warmup, rounds):
        for method, variant in variants.items():
            with torch.autocast(timer.device.type, dtype=torch.bfloat16):
                taken = timer(lambda v=variant: v.step(batch))  # type: ignore[misc]
            if round_ >= 0:
                seconds[method].append(taken)
    num_tokens = case.shape[0] * (case.shape[1] + case.num_target_tokens)
    rows = []
    for method, name in NAMES.items():
        median = statistics.median(seconds[method])
        ratios = (
            statistics.median(a / b for a, b in zip(seconds[method], seconds[other], strict=True))
            for other in ("lora", "peft-lora", "peft-adalora")
        )
        cells = [case.name, f"{num_tokens:,}", name, f"{median:.4f}", f"{num_tokens / median:,.0f}"]
        rows.append(f"| {' | '.join([*cells, *(f'{r:.3f}' for r in ratios)])} |")
    return rows


def update_bandwidth(timer: Timer, num_elements: int) -> str:
    """The update reads three vectors and writes two; a copy reads one and writes one."""
    i_bar, u_bar, products = (torch.rand(num_elements, device=timer.device) for _ in range(3))
    copied = timer.median(lambda: i_bar.copy_(u_bar))
    skip = torch.zeros((), device=timer.device)
    eager, compiled = (
        timer.median(lambda c=c: update_averages(i_bar, u_bar, products, 0.85, 0.85, skip, compiled=c))  # type: ignore[misc]
        for c in (False, True)
    )
    shares = f"{2.5 * copied / eager:.2f}, compiled {2.5 * copied / compiled:.2f}"
    return f"Importance update of {num_elements:,} elements, share of the bandwidth of a copy: {shares}"


def peak_share(case: Case, timer: Timer, tiny: bool, rounds: int, size: int) -> str:
    """Model operations per second beside those of one large matrix product."""
    variants, batch = variants_of(case, timer.device, tiny, ("adalora",), 16, 12)
    with torch.autocast(timer.device.type, dtype=torch.bfloat16):
        seconds = timer.median(lambda: variants["adalora"].step(batch), rounds)
    config, (rows, length) = variants["adalora"].model.config, case.shape
    num_weights = sum(m.weight.numel() for m in variants["adalora"].model.modules() if isinstance(m, nn.Linear))
    # Frozen weights: a product each for the output and for the gradient of the input, 2 operations per weight; causal
    # attention: scores and mixing, half of each, and twice that backwards.
    attention = 3 * 2 * config.num_hidden_layers * config.hidden_size * length
    operations = rows * length * (4 * num_weights + attention)
    a, b = (torch.rand(size, size, device=timer.device, dtype=torch.bfloat16) for _ in range(2))
    peak = 2 * size**3 / timer.median(lambda: a @ b)
    return (
        f"{case.name}, r = 16, {rows} x {length} tokens: {rows * length / seconds:,.0f} tokens/s, "
        f"{operations / seconds / 1e12:.1f} TFLOP/s, {operations / seconds / peak:.2f} of a {size} x {size} matrix "
        f"product's {peak / 1e12:.1f}"
    )


def gpu() -> None:
    if not torch.cuda.is_available():
        sys.exit("error: benchmark gpu needs a CUDA device, and there is none: the others run on CPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, rank 12 -> 8\n")
    report(torch.device("cuda"))


def report(device: torch.device, tiny: bool = False) -> None:
    """All figures, printed as they come; ``tiny`` replaces the sizes of models and batches, to try this out."""
    timer = Timer(device)
    rounds, warmup = (2, 1) if tiny else (10, 3)
    print(
        "| backbone | tokens | method | seconds | tokens/s | step / our LoRA's | / PEFT LoRA's | / PEFT AdaLoRA's |\n"
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for case in CASES:
        for row in compare(case.tiny() if tiny else case, timer, tiny, rounds, warmup):
            print(row, flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"\n{update_bandwidth(timer, 100_000 if tiny else 30_000_000)}\n", flush=True)
    print(peak_share(LONG.tiny() if tiny else LONG, timer, tiny, rounds, 64 if tiny else 8192))
