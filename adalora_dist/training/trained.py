"""What a run has trained besides adapters: a new classifier, or the whole model."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from adalora_dist.layers import SVDLinear
from adalora_dist.training.engine import full_tensor


def gather_trained(model: nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """The trained parameters that are no adapters, whole, on the CPU, by the names that they have in the backbone.

    Collective: every process calls it, with the model as ``accelerator.unwrap_model`` gives it.

    Args:
        keep: whether this process wants them; others take part and get nothing, one tensor in memory at a time.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the last evaluation may have left it gathered
    trained = {}
    for path, module in model.named_modules():
        if isinstance(module, SVDLinear):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                whole = full_tensor(parameter)
                if keep:
                    trained[f"{path}.{leaf}" if path else leaf] = whole.cpu().clone()
    return trained
