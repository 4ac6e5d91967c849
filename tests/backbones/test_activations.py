"""What checkpointing keeps changes neither loss nor gradients, and is as little as it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adalora_dist.backbones.activations import checkpoint_activations
from adalora_dist.config.activations import ActivationsConfig
from adalora_dist.methods.inject import adapt
from tests.support.adapted_models import build
from tests.support.memory import peak_bytes
from tests.support.models import config
from tests.support.ranks import run_ranks
from tests.support.refusals import refused

KINDS: list[dict[str, Any]] = [
    {},
    {"checkpoint_activations": 2},
    {"checkpoint_activations": "selective"},
    {"checkpoint_activations": "full"},
    {"checkpoint_activations": "full", "offload_activations": True},
    {"checkpoint_activations": "selective", "offload_activations": True},
]
IDS = torch.arange(3, 43).repeat(4, 8)


def settings(kind: dict[str, Any]) -> ActivationsConfig:
    return ActivationsConfig(gradient_checkpointing=bool(kind), **kind)


def step(model: Any) -> list[torch.Tensor]:
    torch.manual_seed(3)  # of dropout
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def outcomes(rank: int, world_size: int) -> list[tuple[list[torch.Tensor], int]]:
    """Loss and gradients, and the bytes at the peak of a step, of every kind."""
    found = []
    for kind in KINDS:
        model = build("llama", num_hidden_layers=4, max_position_embeddings=512, vocab_size=48)
        adapt(model, config("adalora", init_rank=3, targets=("all-linear",), dropout=0.1), 0)
        model.train()
        checkpoint_activations(model, settings(kind))
        result = step(model)
        found.append((result, peak_bytes(lambda model=model: step(model))))
    return found


def test_gradients_are_equal_and_bytes_in_order() -> None:
    (plain, most), *others = run_ranks(1, outcomes)[0]
    assert len(plain) > 50
    for kind, (result, _) in zip(KINDS[1:], others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result, plain, strict=True)), kind
    every_second, selective, full = (num_bytes for _, num_bytes in others[:3])
    assert full < selective < every_second < most


def test_what_a_model_cannot_follow_is_refused() -> None:
    with refused("selective.*LlamaForCausalLM has eager; set attn_implementation to sdpa"):
        checkpoint_activations(build("llama", attn_implementation="eager"), settings(KINDS[2]))
    for kind in KINDS[1:]:
        with refused("gradient_checkpointing true: Linear cannot compute its activations again"):
            checkpoint_activations(torch.nn.Linear(2, 2), settings(kind))
    whole = build("llama")
    whole.model.layers = torch.nn.ModuleList()
    with refused("checkpoint_activations 2.*LlamaForCausalLM does not checkpoint its blocks one by one"):
        checkpoint_activations(whole, settings(KINDS[1]))
    for kind in ({"checkpoint_activations": "selective"}, {"offload_activations": True}):
        with pytest.raises(ValueError, match="with gradient_checkpointing false: nothing is recomputed"):
            ActivationsConfig(**kind)
