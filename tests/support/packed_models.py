"""Small causal models of several families, and rows of unequal lengths to pack for them."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from adalora_dist.tasks.rows.tokens import IGNORED

SMALL = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip


def tiny(family: str, **how: Any) -> Any:
    torch.manual_seed(0)
    if family == "gpt2":
        size = GPT2Config(vocab_size=60, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
        size.resid_pdrop = size.embd_pdrop = size.attn_pdrop = 0.0
        return GPT2LMHeadModel(size).train()
    config = AutoConfig.for_model(family, **SMALL, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config, **how).train()


def some_rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    draw, rows = random.Random(seed), []
    for _ in range(count):
        tokens = [draw.randrange(3, 60) for _ in range(draw.randint(2, 12))]
        rows.append({"input_ids": tokens, "labels": [IGNORED, *tokens[1:]]})
    return rows
