"""How much of a model a run adapts, how much it trains in full, and what the rest is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from adalora_dist.backbones.linears import linear_shape
from adalora_dist.backbones.parts import is_under, output_modules, router_names, tower_names
from adalora_dist.methods.protocol import TrainedModule, adapters_of
from adalora_dist.methods.sites import left_out
from adalora_dist.sharding.packing import packs_of
from adalora_dist.sharding.tensors import full_numel, full_shape

ADAPTED, TRAINED = "adapted", "trained in full"


def weight_shares(model: nn.Module) -> dict[str, int]:
    """Count the model's own weights, by what the run does with them: {kind: count}, the largest first.

    Kinds are ``adapted``, ``trained in full``, and of what stays as it is: experts, embeddings, heads, routers, vision
    and audio, norms and biases, and linear maps that are not targets. A tied weight counts once, where it is named
    first; a quantised one as many numbers as it stands for. No collective: sharded weights count whole.

    Args:
        model: with its adapters, if any; as the engine has it, unwrapped of DDP and DeepSpeed.
    """
    heads, towers, routers = output_modules(model), tower_names(model), router_names(model)
    left = {_plain(name): kind for name, kind in left_out(model).items()}
    adapted = {(id(module), leaf) for adapter in adapters_of(model) for module, leaf in adapter.adapts()}
    experts = [_plain(name) for name, module in model.named_modules() if _holds_experts(name, module)]
    seen: set[int] = set()
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, TrainedModule):
            continue
        path = _plain(name)
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or leaf in packs_of(module):  # adapters
                continue
            seen.add(id(parameter))
            dims = len(full_shape(parameter))
            if (id(module), leaf) in adapted:
                kind = ADAPTED
            elif parameter.requires_grad:
                kind = TRAINED
            elif is_under(path, towers):
                kind = "vision and audio"
            elif is_under(path, routers):
                kind = "routers"
            elif is_under(path, experts):
                kind = "experts"
            elif isinstance(module, nn.Embedding):
                kind = "embeddings"
            elif is_under(path, heads):
                kind = "heads"
            elif dims < 2:
                kind = "norms and biases"
            else:
                kind = left.get(path, "other linear maps" if linear_shape(module) is not None else "other weights")
            counts[kind] = counts.get(kind, 0) + _count(module, leaf, parameter)
    return dict(sorted(counts.items(), key=lambda entry: -entry[1]))


def shares_line(shares: Mapping[str, int], num_matrices: int) -> str:
    """:func:`weight_shares` in one line for the console."""
    total = sum(shares.values())
    parts = []
    if ADAPTED in shares:
        parts.append(f"adapted {num_matrices} matrices = {_percent(shares[ADAPTED], total)} of the model's weights")
    if TRAINED in shares:
        parts.append(f"trained in full: {_percent(shares[TRAINED], total)}")
    rest = [f"{kind} {_percent(n, total)}" for kind, n in shares.items() if kind not in (ADAPTED, TRAINED)]
    if rest:
        parts.append(f"{'not adapted' if ADAPTED in shares else 'not trained'}: {', '.join(rest)}")
    return "; ".join(parts)


def _percent(part: int, total: int) -> str:
    percent = 100 * part / total
    return f"{percent:.0f} %" if percent >= 1 else f"{percent:.1f} %" if percent >= 0.05 else "<0.1 %"


def _plain(name: str) -> str:
    """The name that a module within an adapter has in the plain model."""
    return name.removesuffix(".base")


def _holds_experts(name: str, module: nn.Module) -> bool:
    """A list of experts, or a module whose parameters are stacks of theirs."""
    return "expert" in name.rpartition(".")[2] or "Expert" in type(module).__name__


def _count(module: nn.Module, leaf: str, parameter: torch.Tensor) -> int:
    """How many numbers a parameter stands for: all, if it is sharded; those of the linear map, if it is packed."""
    shape = linear_shape(module)
    if leaf == "weight" and shape is not None and len(full_shape(parameter)) <= 2:
        return shape[0] * shape[1]
    return full_numel(parameter)
