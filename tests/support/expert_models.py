"""Tiny mixtures of experts of nine architectures, and what a step over one of them needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

SIZES: dict[str, Any] = dict(
    vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
ROUTED: dict[str, Any] = SIZES | dict(num_experts_per_tok=2, moe_intermediate_size=8, intermediate_size=24)
GROUPED = ROUTED | dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1)
LATENT: dict[str, Any] = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)

MIXTURES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2)
    ),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(**ROUTED, num_experts=4, shared_expert_intermediate_size=8)
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**ROUTED, num_experts=4, head_dim=8)),
    "olmoe": lambda: tf.OlmoeForCausalLM(
        tf.OlmoeConfig(**SIZES, intermediate_size=8, num_experts=4, num_experts_per_tok=2)
    ),
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(
            **SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8
        )
    ),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(**GROUPED | {"num_key_value_heads": 2}, **LATENT)
    ),
    "glm4_moe": lambda: tf.Glm4MoeForCausalLM(tf.Glm4MoeConfig(**GROUPED, head_dim=8)),
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **SIZES, intermediate_size=24, intermediate_size_mlp=24, num_local_experts=4, num_experts_per_tok=1,
            head_dim=8, interleave_moe_layer_step=1, attention_chunk_size=16,
        )
    ),
    "phimoe": lambda: tf.PhimoeForCausalLM(
        tf.PhimoeConfig(
            **SIZES, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.0,
            input_jitter_noise=0.0,
        )
    ),
}  # fmt: skip


def mixture(kind: str, seed: int = 0) -> Any:
    """One of :data:`MIXTURES`, its experts far enough apart that each matters."""
    torch.manual_seed(seed)
    model = MIXTURES[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name or "router" in name or name.endswith("mlp.gate.weight"):
                parameter.normal_(std=0.3)
    model.set_experts_implementation("eager")  # what stays without adapters computes in float64, too
    model.config.use_cache = False
    return model


def loss_of(model: Any, seed: int = 1, length: int = 12) -> torch.Tensor:
    """The language model's loss on rows drawn from ``seed``."""
    ids = torch.randint(3, 32, (2, length), generator=torch.Generator().manual_seed(seed))
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss
