"""What a run has trained besides adapters: a new classifier, or the whole model."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from adalora_dist.methods.protocol import others_trained
from adalora_dist.sharding.tensors import full_tensor, reshard


def gather_trained(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters that are no adapters, whole, on the CPU, by the names that they have in the backbone.

    For the main process; the others take part and get nothing, one tensor in memory at a time. Collective.

    Args:
        model: as the engine wraps it.
    """
    reshard(model)
    release = getattr(model, "empty_partition_cache", None)
    if release is not None:  # ZeRO-3 is still fetching for a backward that does not follow an evaluation
        release()
    trained = {}
    for name, parameter in others_trained(accelerator.unwrap_model(model)):
        whole = full_tensor(parameter)
        if accelerator.is_main_process:
            trained[name] = whole.cpu().clone()
    return trained
