"""What a run has trained besides adapters: a new classifier, or the whole model."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from adalora_dist.methods.protocol import others_trained
from adalora_dist.sharding.tensors import release_gathered, whole_tensor


def gather_trained(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters that are no adapters, whole, on the CPU, by the names that they have in the backbone.

    For the main process; the others take part and get nothing, one tensor in memory at a time. Collective.

    Args:
        model: as the engine wraps it.
    """
    release_gathered(model)
    trained = {}
    for name, parameter in others_trained(accelerator.unwrap_model(model)):
        whole = whole_tensor(parameter)
        if accelerator.is_main_process:
            trained[name] = whole.cpu().clone()
    return trained
