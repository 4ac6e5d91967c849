"""All that a run has made of its model: the update of each adapted matrix, and what was trained in full besides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from adalora_dist.methods.protocol import others_trained, plain_path
from adalora_dist.methods.update import Update
from adalora_dist.sharding.agreement import this_rank
from adalora_dist.sharding.tensors import put_back_shards, whole_tensor


class Updates(list[Update]):
    """The updates in canonical order. Whoever writes them finds here what else belongs to the result.

    Args:
        updates: of every adapted matrix.
        trained: what was trained in full besides, whole, by the name that it has in the plain model.
        model: that was trained, for what its configuration says. It stays behind where updates are pickled.
    """

    def __init__(self, updates: Iterable[Update], trained: dict[str, torch.Tensor], model: nn.Module | None) -> None:
        super().__init__(updates)
        self.trained, self.model = trained, model

    def __getstate__(self) -> dict[str, Any]:
        return {"trained": self.trained, "model": None}


def gather_trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters that are no adapters, by the names that they have in the backbone: whole, on the CPU.

    For the main process; the others take part and get nothing, one tensor in memory at a time. Collective. What an
    engine's wrapper has gathered for a forward is given up before, by
    :func:`adalora_dist.sharding.tensors.release_gathered`.

    Args:
        model: wrapped or not.
    """
    put_back_shards(model)
    trained = {}
    for path, parameter in others_trained(model):
        whole = whole_tensor(parameter)
        if this_rank() == 0:
            trained[plain_path(path)] = whole.cpu().clone()
    return trained
