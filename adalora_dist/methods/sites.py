"""Where adapters go, and what is trained beside them: names of modules."""

from __future__ import annotations

import re

from torch import nn

from adalora_dist.backbones.linears import linear_shape
from adalora_dist.backbones.names import new_backbone_modules
from adalora_dist.config.methods import AdapterConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.layers import SVDLinear


def trained_modules(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Names of the modules that ``train_modules`` asks for; ``task-head`` stands for all modules outside the backbone,
    and for those at its end that its files lack, such as the pooler of a masked language model.

    Raises:
        UserError: a name that matches nothing; ``task-head`` where the model is a backbone alone, or where its head is
            tied to the embeddings.
    """
    matched = []
    if explicit := tuple(pattern for pattern in config.train_modules if pattern != "task-head"):
        matched = _match(model, explicit, "train_modules")
    if "task-head" not in config.train_modules:
        return matched
    backbone = getattr(model, "base_model", model)
    inside = {id(p) for p in backbone.parameters()}
    heads = [name for name, module in model.named_children() if module is not backbone and list(module.parameters())]
    if backbone is model or not heads:
        raise UserError(f"train_modules=task-head: {type(model).__name__} has nothing outside its backbone")
    for name in heads:
        if any(id(p) in inside for p in model.get_submodule(name).parameters()):
            raise UserError(
                f"train_modules=task-head: {name} is tied to the backbone's embeddings, which would be trained, too: "
                "leave task-head out of train_modules"
            )
    return [*matched, *heads, *new_backbone_modules(model)]


def _find_targets(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    if any(isinstance(module, SVDLinear) for module in model.modules()):
        raise UserError("the model already has adapters: inject into the plain backbone")
    matched = set()
    if "all-linear" in targets:
        matched |= set(_all_linear(model))
    if explicit := tuple(t for t in targets if t != "all-linear"):
        matched |= set(_match(model, explicit, "targets"))
    names = [name for name, _ in model.named_modules() if name in matched]

    owners: dict[int, str] = {}
    targeted = {id(model.get_submodule(name)): name for name in names}
    for name, module in model.named_modules(remove_duplicate=False):
        if targeted.get(id(module), name) != name:
            raise UserError(
                f"targets: {name} and {targeted[id(module)]} are one shared module; an adapter there would count "
                "twice: leave both out of targets"
            )
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            other = owners.setdefault(id(parameter), name)
            if other != name and (name in matched or other in matched):
                raise UserError(
                    f"targets: the weight of {name} is tied to {other}; merging an adapter would change both: "
                    f"leave {name if name in matched else other} out of targets"
                )
    for name in names:
        if linear_shape(model.get_submodule(name)) is None:
            kind = type(model.get_submodule(name)).__name__
            raise UserError(f"targets: {name} is a {kind}, not a linear map (nn.Linear, Conv1D or a quantised linear)")
    return names


def _all_linear(model: nn.Module) -> list[str]:
    """Every linear map of the backbone; output heads (lm_head, classifiers) are outside it and are left alone."""
    backbone = getattr(model, "base_model", model)
    prefix = next((name for name, module in model.named_modules() if module is backbone), "")
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    names = [
        f"{prefix}.{name}" if prefix else name
        for name, module in backbone.named_modules()
        if linear_shape(module) is not None and module is not head and not list(module.children())
    ]
    new = tuple(f"{name}." for name in new_backbone_modules(model))
    names = [name for name in names if not f"{name}.".startswith(new)]  # random: trained in full, or refused
    if not names:
        raise UserError(f"targets='all-linear': {type(backbone).__name__} has no linear maps")
    return names


def _match(model: nn.Module, patterns: tuple[str, ...], field: str) -> list[str]:
    """Module names that equal a pattern, end with '.pattern', or match it as a regular expression in full."""
    matched: list[str] = []
    all_names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        hits = [n for n in all_names if n == pattern or n.endswith(f".{pattern}")]
        if not hits:
            hits = [n for n in all_names if re.fullmatch(pattern, n)]
        if not hits:
            leaves = sorted({n.rpartition(".")[2] for n in all_names if linear_shape(model.get_submodule(n))})
            raise UserError(
                f"{field}: {pattern!r} matches no module of {type(model).__name__}; "
                f"its linear modules are named {', '.join(leaves[:20])}"
            )
        matched += hits
    return matched
