"""What an engine does to a tensor: asked here only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def full_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """The whole parameter, detached, on every process, as the next forward has it. Collective where it is sharded."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def _held(tensor: Any) -> list[torch.Tensor]:
    """The parts of a tensor that are on this process."""
    if isinstance(tensor, DTensor):
        return [tensor.to_local()]
    # ZeRO-3: this process's partition, and the whole where a small parameter stays gathered.
    return [tensor.ds_tensor, tensor.data] if hasattr(tensor, "ds_tensor") else [tensor.data]


def reshard(model: nn.Module) -> None:
    """Put the optimizer's parameters back into their modules. No effect but under FSDP2; no collective.

    A forward without a backward leaves gathered what lies outside the layers: a classifier, BERT's pooler.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
