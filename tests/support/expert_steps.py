"""Adapted experts away from their start, and the same loss by a loop over the experts of the plain model."""

from __future__ import annotations

from typing import Any

import torch
from torch.func import functional_call

from adalora_dist.methods.adalora.experts import ExpertTriplets


def expert_layers(adapters: Any) -> list[ExpertTriplets]:
    return [adapter for adapter in adapters if isinstance(adapter, ExpertTriplets)]


def moved(model: Any, adapters: Any) -> None:
    """Away from the start, where P is 0."""
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in adapters:
            layer.P.normal_(std=0.2)
        model.adalora.lam.uniform_(0.5, 1.5)


def looped_loss(plain: Any, layers: Any, factors: Any) -> torch.Tensor:
    """The loss of the plain model, its experts in transformers' own loop, with W + s P diag(lam) Q for every expert."""
    weights = {}
    for layer in layers:
        weight, (p, lam, qt) = plain.get_parameter(layer.name), factors[layer.name]
        sums, first = [], 0
        for matrix, rank in zip(weight.unbind(0), layer.ranks, strict=True):
            own = slice(first, first + rank)
            delta = layer.scale * (p[:, own] * lam[own]) @ qt[:, own].T
            sums.append(matrix + (delta.T if layer.stack.is_transposed else delta))
            first += rank
        weights[layer.name] = torch.stack(sums)
    ids = torch.randint(3, 32, (2, 12), generator=torch.Generator().manual_seed(1))
    loss: torch.Tensor = functional_call(plain, weights, kwargs={"input_ids": ids, "labels": ids}).loss
    return loss
