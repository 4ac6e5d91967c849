"""What a run has trained in full besides its adapters, put back into a plain model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adalora_dist.io.errors import UserError


@torch.no_grad()
def put_trained(
    model: nn.Module, trained: Mapping[str, torch.Tensor], task: Mapping[str, Any], folder: str | Path
) -> None:
    """Give parameters of ``model`` the values that they were trained to.

    Args:
        model: plain.
        trained: by parameter name.
        task: of the model that was trained, as ``task_settings`` says it; empty where nothing is known.
        folder: where they were read, for messages.

    Raises:
        UserError: one is not in the model in its shape; nothing has been changed then.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in trained.items():
        own = parameters.get(name)
        if own is not None and own.shape == value.shape:
            continue
        found = "is not in this model" if own is None else f"is {_size(value)} there, and {_size(own)} in this model"
        kind = next(iter(task.get("architectures", ())), "its base model")
        labels = f" with num_labels={len(task['id2label'])}" if "id2label" in task else ""
        raise UserError(f"{folder}: {name}, which was trained in full, {found}: load {kind}{labels}")
    for name, value in trained.items():
        parameters[name].copy_(value)


def _size(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
