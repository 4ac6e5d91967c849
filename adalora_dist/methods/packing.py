"""``pack_adapters``: the adapters' parameters of every block into one, before FSDP2 or ZeRO-3 takes them over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from adalora_dist.backbones.parts import outermost
from adalora_dist.config.methods import MethodConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods import method_for
from adalora_dist.methods.adapter import Adapter
from adalora_dist.sharding.optimizer_state import KNOWN, keeps_an_entry_per_weight
from adalora_dist.sharding.packing import Pack
from adalora_dist.sharding.tensors import is_whole


def pack_adapters(model: nn.Module, config: MethodConfig) -> int:
    """Put what adapters train in one block into one parameter, after ``adapt``, before there is an optimizer.

    FSDP2 and ZeRO-3 work as much for each parameter, however small it is; to other engines it makes no difference.
    What is learnt is the same under an optimizer that steps every weight by itself, as AdamW does, and so is what is
    saved. What has another learning rate, or is not decayed, goes into a parameter of its own. Methods other than
    adalora and lora, experts, adapters outside of blocks, and what is frozen or packed already stay as they are.

    Args:
        model: not wrapped; it says what its blocks are (transformers' ``_no_split_modules``).
        config: of its adapters.

    Returns:
        The number of parameters that this call has packed.

    Raises:
        UserError: an engine has taken the model over.
    """
    groups = method_for(config).parameter_groups(model, 1.0)
    group_of = {id(p): k for k, group in enumerate(groups) for p in group["params"]}
    count = 0
    for block, adapters in _by_block(model):
        places: dict[Any, list[tuple[nn.Module, str]]] = {}
        for adapter in adapters:
            for leaf, parameter in adapter.named_parameters(recurse=False):
                if not is_whole(parameter):
                    raise UserError(
                        f"pack_adapters: {adapter.name}.{leaf} is sharded already: call it after adapt, before the "
                        "optimizer is made and the engine (fully_shard, DeepSpeed, accelerate's prepare) takes over"
                    )
                if (number := group_of.get(id(parameter))) is not None:
                    places.setdefault((number, parameter.dtype, parameter.device), []).append((adapter, leaf))
        for group in places.values():
            pack = Pack(block, group)
            for adapter in adapters:
                adapter.packed = {**adapter.packed, **{leaf: pack for owner, leaf in group if owner is adapter}}
            count += len(group)
    return count


def check_packed(adapters: Sequence[Adapter], optimizer: Any) -> None:
    """Raise for an optimizer that may look at a parameter as a whole, where adapters are packed.

    Args:
        optimizer: the torch optimizer.

    Raises:
        UserError: it is none of those that are known to step every weight by itself.
    """
    if any(adapter.packed for adapter in adapters) and not keeps_an_entry_per_weight(optimizer):
        raise UserError(
            f"{type(optimizer).__name__} may not step every weight by itself, as packed adapters need it: use {KNOWN}, "
            "or leave pack_adapters out"
        )


def _by_block(model: nn.Module) -> list[tuple[nn.Module, list[Adapter]]]:
    """Blocks with the adapters in them that can be packed, if these are several parameters."""
    names = set(getattr(model, "_no_split_modules", None) or ())

    def is_block(module: nn.Module) -> bool:
        return type(module).__name__ in names and not isinstance(module, nn.ModuleList | nn.ModuleDict)  # never called

    blocks = outermost(model, is_block)
    found = [(b, [m for m in b.modules() if isinstance(m, Adapter) and m.can_be_packed]) for b in blocks]
    return [(b, adapters) for b, adapters in found if sum(len(a._parameters) for a in adapters) > 1]
