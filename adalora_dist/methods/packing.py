"""``pack_adapters``: the adapters' parameters of every block into one, before an engine takes them over."""

from __future__ import annotations

from torch import nn

from adalora_dist.methods.adapter import Adapter
from adalora_dist.methods.protocol import Method
from adalora_dist.sharding.packing import Pack


def pack_adapters(model: nn.Module, method: Method) -> int:
    """Put what adapters train in one block into one parameter, before there is an optimizer.

    For elementwise optimizers, such as AdamW. What is stepped at another learning rate, or is not decayed, goes into
    a parameter of its own. Adapters outside of blocks, and of methods that read their parameters elsewhere than in
    their own forward, stay as they are.

    Args:
        model: adapted; it says what its blocks are (transformers' ``_no_split_modules``).

    Returns:
        The number of parameters that are packed.
    """
    group_of = {id(p): k for k, group in enumerate(method.parameter_groups(model, 1.0)) for p in group["params"]}
    count = 0
    for block, adapters in _by_block(model):
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for adapter in adapters:
            for leaf, parameter in adapter.own_parameters().items():
                places.setdefault(group_of[id(parameter)], []).append((adapter, leaf))
        for number, group in enumerate(places.values()):
            pack = Pack(block, number, group)
            for adapter in adapters:
                adapter.packed = {**adapter.packed, **{leaf: pack for owner, leaf in group if owner is adapter}}
            count += len(group)
    return count


def _by_block(model: nn.Module) -> list[tuple[nn.Module, list[Adapter]]]:
    """Blocks with the adapters in them that can be packed, if these are several parameters."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():  # what contains comes first
        if type(module).__name__ in names and module not in inside:
            blocks.append(module)
            inside.update(module.modules())
    found = [(b, [m for m in b.modules() if isinstance(m, Adapter) and m.can_be_packed]) for b in blocks]
    return [(b, adapters) for b, adapters in found if sum(len(a.own_parameters()) for a in adapters) > 1]
