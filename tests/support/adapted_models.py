"""Small models of four kinds, adapters in them, and what they then say: for tests of what is written and read."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from adalora_dist.config.methods import AdaLoraConfig
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.update import AdapterWeights

IDS = torch.tensor([[1, 5, 9, 4, 30, 2], [7, 11, 2, 40, 13, 8]])
RANK, TOLERANCE = 4, 1e-5

LLAMA = LlamaConfig(
    vocab_size=48, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=48, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2)
BART = BartConfig(
    vocab_size=48, max_position_embeddings=32, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24,
    decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2, init_std=0.2,
)  # fmt: skip
DEBERTA = DebertaV2Config(
    vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=32, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"],
    share_att_key=True, norm_rel_ebd="layer_norm", initializer_range=0.2, num_labels=3,
)  # fmt: skip
MODELS = {
    "llama": (LlamaForCausalLM, LLAMA),
    "gpt2": (GPT2LMHeadModel, GPT2),
    "bart": (BartForConditionalGeneration, BART),
    "deberta": (DebertaV2ForSequenceClassification, DEBERTA),
}

STEPS = 14
SETTINGS = AdaLoraConfig(
    init_rank=3, target_rank=1, alpha=12, targets=("all-linear",), start="paper", init="orthonormal",
    initial_warmup_steps=2, final_steps=4, mask_interval_steps=2,
)  # fmt: skip


def build(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    auto_class, config = MODELS[kind]
    return auto_class(type(config)(**{**config.to_dict(), **changes})).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    model.eval()
    return model(input_ids=IDS).logits


def with_adapters(
    model: Any, targets: tuple[str, ...] = ("all-linear",), ranks: tuple[int, ...] = (4, 0, 2, 1, 3)
) -> None:
    """Adapters whose active ranks go round in ``ranks``; active triplets stand anywhere."""
    matrices = adapt(model, AdaLoraConfig(init_rank=RANK, alpha=6, targets=targets, start="paper", init="orthonormal"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for index, layer in enumerate(matrices):
            keep = torch.randperm(RANK, generator=generator)[: ranks[index % len(ranks)]]
            layer.lam[keep] = 0.5 + torch.rand(len(keep), generator=generator)


def weights_of(model: Any) -> list[AdapterWeights]:
    adapters = []
    for layer in (m for m in model.modules() if hasattr(m, "Qt")):
        keep = layer.lam.detach() != 0
        p, q = layer.P.detach()[:, keep].contiguous(), layer.Qt.detach()[:, keep].T.contiguous()
        adapters.append(
            AdapterWeights(layer.name, p, layer.lam.detach()[keep], q, layer.scale, hasattr(layer.base, "nf"))
        )
    return adapters
