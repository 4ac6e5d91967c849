"""Short trainings of the tiny mixtures of experts, on one process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from adalora_dist import AdaLoraConfig, adapt, attach
from adalora_dist.methods.hooks import MethodHooks
from adalora_dist.methods.protocol import Adapter
from tests.support.expert_models import loss_of
from tests.support.steps import make_steps

RANK = 3
FALLING = dict(initial_warmup_steps=1, final_steps=3, mask_interval_steps=1)


def config(**settings: Any) -> AdaLoraConfig:
    return AdaLoraConfig(**{"init_rank": RANK, "target_rank": 1.5, "alpha": 6, **settings})


class Trained(NamedTuple):
    adapters: Sequence[Adapter]
    hooks: MethodHooks
    losses: list[float]
    """Of each step."""


def run(model: Any, adapters_config: AdaLoraConfig, num_steps: int = 8) -> Trained:
    adapters = adapt(model, adapters_config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    hooks = attach(model, optimizer, adapters_config, num_steps)
    losses = make_steps(model, optimizer, hooks, partial(loss_of, model), range(num_steps))
    hooks.finish()
    return Trained(adapters, hooks, losses)
