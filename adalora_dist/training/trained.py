"""What a run has trained besides adapters: a new classifier, or the whole model."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from adalora_dist.methods.adalora.layers import Lambdas, SVDLinear
from adalora_dist.sharding.tensors import release_gathered, whole_tensor


def gather_trained(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters that are no adapters, whole, on the CPU, by the names that they have in the backbone.

    For the main process; the others take part and get nothing, one tensor in memory at a time. Collective.

    Args:
        model: as the engine wraps it.
    """
    release_gathered(model)
    trained = {}
    for path, module in accelerator.unwrap_model(model).named_modules():
        if isinstance(module, SVDLinear | Lambdas):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                whole = whole_tensor(parameter)
                if accelerator.is_main_process:
                    trained[f"{path}.{leaf}" if path else leaf] = whole.cpu().clone()
    return trained
