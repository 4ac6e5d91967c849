"""Put adapters into a model: find the target modules, wrap them, freeze the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from adalora_dist.backbones.linears import linear_shape
from adalora_dist.config.methods import AdaLoraConfig, LoraConfig, LowRankConfig, MethodConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.layers import MODULE_NAME, Lambdas, SVDLinear
from adalora_dist.methods.adalora.start import Triplets, read_peft
from adalora_dist.methods.sites import _find_targets, trained_modules


@dataclass(frozen=True)
class AdaptedMatrix:
    """One adapted matrix: the name its module had in the model, and the module that replaced it."""

    name: str
    layer: SVDLinear


def inject_adapters(model: nn.Module, config: MethodConfig, seed: int = 0) -> list[AdaptedMatrix]:
    """Wrap every target in an :class:`SVDLinear` and leave only adapters and ``train_modules`` trainable.

    With ``HeadConfig`` there are no adapters; with ``FullConfig`` neither, and every parameter is trainable.

    Returns the matrices in the order of ``model.named_modules()``, which fixes the order of triplets everywhere.

    Raises:
        UserError: a target or train module that matches nothing, is not a linear map, is shared between two places,
            or has a weight tied to another module's; ``full`` with weights that are not float32; an ``init_from`` that
            does not fit the targets.
    """
    if config.trains_backbone:
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32:
                raise UserError(
                    f"method={config.method}: {name} is {parameter.dtype}, in which small updates are rounded away: "
                    "set dtype to float32"
                )
            parameter.requires_grad_(True)
        return []
    names = _find_targets(model, config.targets) if isinstance(config, LowRankConfig) else []
    trained = trained_modules(model, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in trained:
        model.get_submodule(name).requires_grad_(True)
    if not isinstance(config, LowRankConfig):
        return []

    generator = torch.Generator().manual_seed(seed)
    start = read_peft(Path(config.init_from), config.alpha / config.init_rank) if config.init_from else {}
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
        scale = config.alpha / config.init_rank
        layer = SVDLinear(base, d_in, d_out, config.init_rank, scale, config.dropout, name)
        if isinstance(config, AdaLoraConfig):
            layer.reset(generator, std=0.02 if config.init == "gaussian" else None)
        else:
            layer.reset_as_lora(generator)
        layer.train(base.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        matrices.append(AdaptedMatrix(name, layer))
    if matrices:
        lambdas = add_lambdas(model, matrices)
        if isinstance(config, LoraConfig):  # lambda is 1 and not trained
            lambdas.lam.requires_grad_(False).fill_(1.0)
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


@torch.no_grad()
def _start_with(layer: SVDLinear, triplets: Triplets, config: LowRankConfig) -> None:
    """Put given triplets before the fresh ones, which add nothing at the start."""
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
    if isinstance(config, LoraConfig):
        p, lam = p * lam, torch.ones_like(lam)
    layer.P[:, : len(lam)] = p.to(layer.P.device)
    layer.lam[: len(lam)] = lam.to(layer.lam.device)
    layer.Qt[:, : len(lam)] = q.T.to(layer.Qt.device)


def adapted_matrices(model: nn.Module) -> list[AdaptedMatrix]:
    """The adapted matrices of a model that already has adapters, in order."""
    return [AdaptedMatrix(module.name, module) for module in model.modules() if isinstance(module, SVDLinear)]
