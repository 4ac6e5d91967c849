"""Bytes of weights, gradients and optimizer state of the pre-training methods, measured after two steps.

    python benchmarks/pretrain_bytes.py                  the published 60M model at rank 128; about a minute on one core
    python benchmarks/pretrain_bytes.py demo --rank 24

One process, float32. ReLoRA also keeps the original of its matrices on the CPU, which is not counted here.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import LlamaForCausalLM

from adalora_dist.config.methods import method_config
from adalora_dist.config.sections import TrainConfig
from adalora_dist.methods import method_for
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt
from adalora_dist.tasks.pretrain.fresh_model import SHAPES, architecture

OTHERS = ("model.embed_tokens", ".*norm", "lm_head")
SETTINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "galore": {},
    "low_rank": {},
    "relora": {"train_modules": OTHERS},
    "lora": {"train_modules": OTHERS},
}


def measured(method: str, size: Any, rank: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients, state."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(architecture(size, 64))
    ranks = {} if method == "full" else {"init_rank": rank}
    config = method_config(method, **ranks, **SETTINGS[method])
    adapt(model, config)
    optimizer = method_for(config).optimizer(model, TrainConfig(learning_rate=1e-3))
    hooks = attach(model, optimizer, config, 8)
    tokens = torch.arange(32)[None]
    gradients = 0
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    hooks.detach()
    held = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return (
        sum(p.nbytes for p in model.parameters()),
        gradients,
        sum(t.nbytes for t in [*held, *hooks.method_step.buffers()]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", default="60m", choices=SHAPES)
    parser.add_argument("--rank", type=int, default=128)
    args = parser.parse_args()
    print(f"{args.size}, rank {args.rank}, MB       weights  gradients     state       sum")
    for method in SETTINGS:
        sizes = measured(method, args.size, args.rank)
        print(f"{method:22}" + "".join(f"{size / 1e6:10.1f}" for size in [*sizes, sum(sizes)]), flush=True)


if __name__ == "__main__":
    main()
