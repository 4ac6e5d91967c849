"""What an engine does to a tensor, and to a model: asked here, so that no file elsewhere knows an engine's types.

A tensor is either whole on this process (one process, DDP, ZeRO-1 and -2, and whatever no engine has taken over), a
``DTensor`` (FSDP2), or marked by ZeRO-3, which keeps a part of it under another name and gathers it for a forward. Or
it stands for a part of a packed one (``packing.py``), which is one of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from adalora_dist.sharding.packing import holder, pack_of, part_of
from adalora_dist.sharding.spans import Span


def class_name(model: nn.Module) -> str:
    """As it is without what ``fully_shard`` puts before it."""
    return type(model).__name__.removeprefix("FSDP")


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether no engine shards this tensor. What a sharding engine has gathered for a moment does not count."""
    tensor = holder(tensor)
    return not isinstance(tensor, DTensor) and not hasattr(tensor, "ds_id")


def full_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    return getattr(tensor, "ds_shape", tensor.shape)


def full_numel(tensor: torch.Tensor) -> int:
    """The number of elements of the whole tensor."""
    return getattr(tensor, "ds_numel", tensor.numel())


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds for good, detached, as a view: all of it, rows (FSDP2), or a flat slice (ZeRO-3)."""
    if pack_of(tensor) is not None:
        return local_elements(tensor)[0]
    local = tensor.to_local() if isinstance(tensor, DTensor) else getattr(tensor, "ds_tensor", tensor)
    return local.detach()


def local_elements(tensor: torch.Tensor) -> tuple[torch.Tensor, Span]:
    """What this process holds for good, flat and without padding, as a view; and which elements of the whole it is."""
    if (pack := pack_of(tensor)) is not None:
        (flat, held), first = local_elements(pack.flat), pack.start(tensor)
        start, stop = (min(max(edge - first, 0), tensor.numel()) for edge in held)
        return flat.narrow(0, min(max(first + start - held.start, 0), len(flat)), stop - start), Span(start, stop)
    local = local_part(tensor).view(-1)
    if isinstance(tensor, DTensor):
        start = first_row(tensor) * tensor.shape[1:].numel() if local.numel() else 0
    elif hasattr(tensor, "ds_tensor"):
        marked: Any = tensor
        start = min(dist.get_rank(marked.ds_process_group) * marked.ds_tensor.ds_numel, full_numel(tensor))
        local = local[: full_numel(tensor) - start]
    else:
        start = 0
    return local, Span(start, start + local.numel())


def first_row(tensor: torch.Tensor) -> int:
    """Where the rows of :func:`local_part` begin in a tensor that is whole or sharded by rows."""
    if not isinstance(tensor, DTensor):
        return 0
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offsets[0]


def held_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Everything that this process has of a tensor in memory now; for counting bytes."""
    if pack_of(tensor) is not None:
        return [local_part(tensor)]
    if isinstance(tensor, DTensor):
        return [tensor.to_local()]
    # ZeRO-3: this process's partition, and the whole where a small parameter stays gathered.
    return [tensor.ds_tensor, tensor.data] if hasattr(tensor, "ds_tensor") else [tensor.data]


def whole_tensor(parameter: torch.Tensor) -> torch.Tensor:
    """The whole parameter, detached, on every process, as the next forward has it. Collective where it is sharded."""
    if pack_of(parameter) is not None:
        return part_of(whole_tensor(holder(parameter)), parameter)
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def norm_share(norm: torch.Tensor) -> torch.Tensor:
    """This process's share of the square of a gradient's norm: the shares of all processes add up to it.

    Args:
        norm: from clipping; the whole one, or under FSDP2 what the processes of a mesh still have to put together.
    """
    num_replicas = dist.get_world_size() if dist.is_initialized() else 1
    if not isinstance(norm, DTensor):
        return norm.square() / num_replicas
    for dim, placement in enumerate(norm.placements):
        if placement.is_partial():
            num_replicas //= norm.device_mesh.size(dim)
    return norm.to_local().square() / num_replicas


def awaits_gradient(parameter: torch.Tensor) -> bool:
    """Whether an engine waits in a hook for the parameter's gradient, and takes none for an error (ZeRO-1 and 2)."""
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def with_every_gradient(loss: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """``loss``, from whose backward every parameter hears, also those that had no part in it.

    DDP waits for all of them. They get no gradient, which it takes for 0; nothing is computed, and no graph searched.
    """
    joined: torch.Tensor = _Joined.apply(loss, *parameters)  # type: ignore[no-untyped-call]
    return joined


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.count = len(parameters)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, *[None] * ctx.count


def put_back_shards(model: nn.Module) -> None:
    """Put the optimizer's parameters back into their modules. No effect but under FSDP2; no collective.

    A forward without a backward leaves gathered what lies outside the layers: a classifier, BERT's pooler.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def release_gathered(model: nn.Module) -> None:
    """Give up all that is gathered or on its way, before something else than a forward reads parameters.

    ZeRO-3 is still fetching for a backward that does not follow an evaluation.

    Args:
        model: as the engine wraps it.
    """
    put_back_shards(model)
    release = getattr(model, "empty_partition_cache", None)
    if release is not None:
        release()


def gather_for(model: nn.Module, method: str) -> None:
    """Make ``model.method`` gather what FSDP2 gathers for the model's forward alone. No effect elsewhere."""
    register_fsdp_forward_method(model, method)
