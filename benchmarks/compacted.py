"""What a training step costs after compaction, beside plain LoRA with the same rank in every matrix.

    python benchmarks/compacted.py

A LLaMA of small sizes is trained until its pattern is frozen, and compacted. Then it takes turns with a LoRA of that
pattern, and with the same run left masked. Thread CPU seconds of one core, medians over rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adalora_dist.config.methods import MethodConfig, method_config, settings_of
from adalora_dist.methods.adalora.compaction import shrink_layers
from adalora_dist.methods.hooks import MethodHooks, attach
from adalora_dist.methods.inject import adapt

SHAPE: dict[str, Any] = dict(
    hidden_size=768, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=12, vocab_size=1000
)
INIT_RANK, TARGET_RANK, STEPS, ROUNDS = 12, 8, 20, 15


def llama_with_adapters(method: str) -> tuple[Any, MethodConfig, list[Any]]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    falling = dict(target_rank=TARGET_RANK, initial_warmup_steps=2, mask_interval_steps=1, final_steps=STEPS - 8)
    config = method_config(method, init_rank=INIT_RANK, **settings_of(method, falling))
    return model, config, adapt(model, config)


def trainer(model: Any, config: Any, batch: torch.Tensor) -> tuple[Callable[[], None], MethodHooks, Any]:
    """(one training step, hooks, optimizer)."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    hooks = attach(model, optimizer, config, STEPS)
    hooks.detach()

    def step() -> None:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, hooks, optimizer


def main() -> None:
    torch.set_num_threads(1)
    batch = torch.randint(SHAPE["vocab_size"], (8, 64), generator=torch.Generator().manual_seed(0))
    steps: dict[str, Callable[[], None]] = {}
    for name in ("masked", "compacted"):
        model, config, matrices = llama_with_adapters("adalora")
        steps[name], hooks, optimizer = trainer(model, config, batch)
        allocator: Any = hooks.method_step
        while not allocator.frozen:
            steps[name]()
        if name == "compacted":
            allocator.compact(hooks, model, optimizer)
    pattern = [m.triplets for m in matrices]
    model, config, matrices = llama_with_adapters("lora")
    shrink_layers(matrices, pattern)
    steps["LoRA"], _, _ = trainer(model, config, batch)

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(-3, ROUNDS):
        for name, step in steps.items():
            started = time.thread_time()
            step()
            if round_ >= 0:
                seconds[name].append(time.thread_time() - started)
    ranks = [len(triplets) for triplets in pattern]
    print(
        f"{SHAPE}, {len(ranks)} matrices, ranks {min(ranks)} to {max(ranks)}, {batch.numel()} tokens a step, float32\n"
    )
    print("| AdaLoRA, pattern frozen | step / step of LoRA at the same ranks |\n| --- | ---: |")
    for name in ("compacted", "masked"):
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["LoRA"], strict=True))
        print(f"| {name} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
