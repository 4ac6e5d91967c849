"""Put adapters into a model: find the target modules, wrap them, freeze the rest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from adalora_dist.config import AdapterConfig
from adalora_dist.errors import UserError
from adalora_dist.lambdas import MODULE_NAME, Lambdas
from adalora_dist.layers import SVDLinear
from adalora_dist.peft_import import Triplets, read_peft


@dataclass(frozen=True)
class AdaptedMatrix:
    """One adapted matrix: the name its module had in the model, and the module that replaced it."""

    name: str
    layer: SVDLinear


def inject_adapters(model: nn.Module, config: AdapterConfig, seed: int = 0) -> list[AdaptedMatrix]:
    """Wrap every target in an :class:`SVDLinear` and leave only adapters and ``train_modules`` trainable.

    With ``method="head"`` there are no adapters; with ``method="full"`` neither, and every parameter is trainable.

    Returns the matrices in the order of ``model.named_modules()``, which fixes the order of triplets everywhere.

    Raises:
        UserError: a target or train module that matches nothing, is not a linear map, is shared between two places,
            or has a weight tied to another module's; ``full`` with weights that are not float32; an ``init_from`` that
            does not fit the targets.
    """
    if config.method == "full":
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32:
                raise UserError(
                    f"method=full: {name} is {parameter.dtype}, in which small updates are rounded away: set dtype to "
                    "float32"
                )
            parameter.requires_grad_(True)
        return []
    names = _find_targets(model, config.targets) if config.method != "head" else []
    trained = trained_modules(model, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in trained:
        model.get_submodule(name).requires_grad_(True)

    generator = torch.Generator().manual_seed(seed)
    start = read_peft(Path(config.init_from), config.scale) if config.init_from else {}
    if unknown := sorted(start.keys() - set(names)):
        raise UserError(
            f"init_from={config.init_from}: {len(unknown)} of its matrices ({', '.join(unknown[:3])}) are not among "
            "the targets: name them there, and use the adapter's own base model"
        )
    matrices = []
    for name in names:
        base = model.get_submodule(name)
        base.requires_grad_(False)
        d_in, d_out = linear_shape(base) or (0, 0)
        layer = SVDLinear(base, d_in, d_out, config.init_rank, config.scale, config.dropout, name)
        if config.starts_as_lora:
            layer.reset_as_lora(generator)
        else:
            layer.reset(generator, std=None if config.init == "orthonormal" else 0.02)
        layer.train(base.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        matrices.append(AdaptedMatrix(name, layer))
    if matrices:
        lambdas = add_lambdas(model, matrices)
        if config.starts_as_lora:
            with torch.no_grad():
                lambdas.lam.fill_(1.0)
        if config.method == "lora":  # lambda stays 1
            lambdas.lam.requires_grad_(False)
    for matrix in matrices:
        if matrix.name in start:
            _start_with(matrix.layer, start[matrix.name], config)
    return matrices


def add_lambdas(model: nn.Module, matrices: Sequence[AdaptedMatrix]) -> Lambdas:
    """Give the layers of ``matrices``, all that the model has, their lambdas: one vector, on the model itself.

    Raises:
        UserError: the name is taken.
    """
    if hasattr(model, MODULE_NAME):
        raise UserError(f"{type(model).__name__} has an attribute {MODULE_NAME!r} already: adapters need that name")
    if any(p.requires_grad and p.dtype != torch.float32 for p in model.parameters()):
        # FSDP2 wants one type of what is trained in a group. Here lambda would meet others in the root's: accelerate
        # makes groups of these classes.
        model._no_split_modules = {*(getattr(model, "_no_split_modules", None) or ()), Lambdas.__name__}  # type: ignore[assignment]
    lambdas = Lambdas([matrix.layer for matrix in matrices])
    model.add_module(MODULE_NAME, lambdas)
    return lambdas


def trained_modules(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Names of the modules that ``train_modules`` asks for; ``task-head`` stands for all modules outside the backbone.

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
    return [*matched, *heads]


@torch.no_grad()
def _start_with(layer: SVDLinear, triplets: Triplets, config: AdapterConfig) -> None:
    """Put given triplets before the fresh ones, which add nothing at the start.

    Where the start is LoRA's, lambda goes into P: the given triplets then grow as the fresh ones do.
    """
    p, lam, q = triplets
    if len(lam) > layer.rank:
        raise UserError(
            f"init_from={config.init_from} has rank {len(lam)} at {layer.name}, with init_rank {layer.rank}: set "
            f"init_rank to at least {len(lam)}"
        )
    if (len(p), q.shape[1]) != (layer.d_out, layer.d_in):
        raise UserError(
            f"init_from={config.init_from}: {layer.name} is {len(p)} x {q.shape[1]} there and {layer.d_out} x "
            f"{layer.d_in} in this model: use the adapter's own base model"
        )
    if config.starts_as_lora:
        p, lam = p * lam, torch.ones_like(lam)
    layer.P[:, : len(lam)] = p.to(layer.P.device)
    layer.lam[: len(lam)] = lam.to(layer.lam.device)
    layer.Qt[:, : len(lam)] = q.T.to(layer.Qt.device)


def parameter_groups(model: nn.Module, config: AdapterConfig, learning_rate: float) -> list[dict[str, Any]]:
    """What is trained in ``model``, as groups for a torch optimizer.

    One group, or with another ``lora_plus_ratio`` than 1 two: the P of all matrices, at ``lora_plus_ratio`` times
    ``learning_rate``, come last. Each group says in ``lr_ratio`` what its rate is multiplied by: whoever sets rates by
    hand keeps the ratio with it. (A scheduler that multiplies rates keeps it by itself.)
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    ratio = config.lora_plus_ratio if config.has_adapters else 1.0
    of_p = {id(m.layer.P) for m in adapted_matrices(model) if m.layer.rank} if ratio != 1 else set()
    rest, ps = [p for p in trained if id(p) not in of_p], [p for p in trained if id(p) in of_p]
    groups = [{"params": rest, "lr": learning_rate, "lr_ratio": 1.0}]
    groups += [{"params": ps, "lr": ratio * learning_rate, "lr_ratio": ratio}] if ps else []
    return [group for group in groups if group["params"]]


def adapted_matrices(model: nn.Module) -> list[AdaptedMatrix]:
    """The adapted matrices of a model that already has adapters, in order."""
    return [AdaptedMatrix(module.name, module) for module in model.modules() if isinstance(module, SVDLinear)]


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear map, or None. Quantised linears derive from nn.Linear or carry its attributes."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return cast(int, module.in_features), cast(int, module.out_features)
    if hasattr(module, "nf") and hasattr(module, "nx"):  # transformers' Conv1D, weight (d_in, d_out)
        return cast(int, module.nx), cast(int, module.nf)
    return None


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
