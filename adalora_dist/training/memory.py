"""What this process holds of a prepared model, in bytes, counted from the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from adalora_dist.inject import linear_shape
from adalora_dist.training.loop import Prepared


def held_bytes(prepared: Prepared) -> dict[str, int]:
    """Bytes on this process by purpose, between two steps. No collective.

    ``linear_bytes``: frozen linear maps, with the scales of quantised ones; ``other_bytes``: embeddings, norms, head;
    ``adapter_bytes``; ``optimizer_bytes``: moments and, where the engine has them, master weights;
    ``importance_bytes``. Whole storages are counted, so a small view that keeps a large tensor alive shows.
    """
    model: Any = prepared.model
    head = getattr(model, "module", model).get_output_embeddings()
    frozen_linear: list[torch.Tensor] = []
    other: list[torch.Tensor] = []
    adapters: list[torch.Tensor] = []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            linear = linear_shape(module) is not None and module is not head
            kind = adapters if parameter.requires_grad else frozen_linear if linear else other
            kind += _held(parameter)
        frozen_linear += _quantization_state(module)
    optimizer = prepared.inner_optimizer
    moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    allocator = prepared.allocator
    importance = [] if allocator is None else [allocator.sensitivity, allocator.uncertainty]
    return {
        "linear_bytes": _storage_bytes(frozen_linear),
        "other_bytes": _storage_bytes(other),
        "adapter_bytes": _storage_bytes(adapters),
        "optimizer_bytes": _storage_bytes([t for p in [*moments, *masters] for t in _held(p)], without=adapters),
        "importance_bytes": _storage_bytes(importance),
    }


def _held(tensor: Any) -> list[torch.Tensor]:
    """The parts of a tensor that are on this process."""
    if isinstance(tensor, DTensor):
        return [tensor.to_local()]
    # ZeRO-3: this process's partition, and the whole where a small parameter stays gathered.
    return [tensor.ds_tensor, tensor.data] if hasattr(tensor, "ds_tensor") else [tensor.data]


def _quantization_state(module: nn.Module) -> Iterator[torch.Tensor]:
    """Scales, and with int8 the weights, that bitsandbytes keeps outside of parameters."""
    states = [getattr(module, name, None) for name in ("quant_state", "state", "weight")]
    for part in (*states, *(getattr(state, "state2", None) for state in states)):
        values = (getattr(part, name, None) for name in ("absmax", "code", "offset", "CB", "SCB"))
        yield from (value for value in values if isinstance(value, torch.Tensor))


def _storage_bytes(tensors: Iterable[torch.Tensor], without: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the distinct storages behind ``tensors`` that do not lie behind ``without``."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    for tensor in without:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())
