"""GaLore (arXiv 2403.03507): full-rank weights whose optimizer works on projections of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from adalora_dist.config.methods.galore import GaLoreConfig
from adalora_dist.config.sections import TrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.galore.optimizer import ProjectedAdamW
from adalora_dist.methods.galore.step import BETAS, EPS, GaLoreStep, projected_modules
from adalora_dist.methods.protocol import Adapter, Method, Step
from adalora_dist.methods.sites import find_targets, train_in_place
from adalora_dist.sharding.tensors import full_shape


class GaLore(Method):
    """No adapters, nothing frozen; the weights of ``targets`` are marked."""

    config: GaLoreConfig
    said = "Weights trained with projected gradients (GaLore, [arXiv 2403.03507](https://arxiv.org/abs/2403.03507))"

    def adapt(self, model: nn.Module, generator: torch.Generator) -> list[Adapter]:
        """Make every parameter trainable, and mark the matrices whose gradients are projected.

        Raises:
            UserError: a target without a match, or a parameter that is not float32.
        """
        for name in find_targets(model, self.config.targets):
            module: Any = model.get_submodule(name)
            module.projected_as = name
        train_in_place("galore", model.named_parameters())
        return []

    def undecayed(self, model: nn.Module) -> list[torch.Tensor]:
        """Vectors: biases and the weights of norms."""
        return [p for p in model.parameters() if p.requires_grad and len(full_shape(p)) == 1]

    def parameter_groups(self, model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
        """As of every method; besides, each group says in ``projected`` whether its gradients are projected."""
        marked = {id(module.weight) for module in projected_modules(model).values()}
        made = []
        for group in super().parameter_groups(model, learning_rate):
            for projected in (False, True):
                if chosen := [p for p in group["params"] if (id(p) in marked) == projected]:
                    made.append({**group, "params": chosen, "projected": projected})
        return made

    def optimizer(self, model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
        return ProjectedAdamW(
            self.parameter_groups(model, train.learning_rate),
            betas=BETAS,
            eps=EPS,
            weight_decay=train.weight_decay,
            fused=train.precision != "fp16",  # as of every method
        )

    def check_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().check_optimizer(model, optimizer)
        if not projected_modules(model):
            raise UserError("no matrix of the model is marked: call adapt(model, config) before attach")
        if not isinstance(optimizer, ProjectedAdamW):
            raise UserError(
                f"method=galore with {type(optimizer).__name__}, which would keep full-size averages and treat "
                "projected updates as gradients: use GaLore's own optimizer, ProjectedAdamW over "
                "parameter_groups(model, config, learning_rate)"
            )

    def step(self, adapters: Sequence[Adapter], total_steps: int) -> Step:
        return GaLoreStep(self.config)
