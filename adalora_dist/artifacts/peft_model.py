"""``convert_peft``: a model that PEFT has put LoRA or AdaLoRA into, as one with adapters of this project's.

It computes what it did. PEFT's layers leave, and with them all that knows of them: what a wrapper of PEFT's would still
offer (saving, merging, switching off) would say nothing of the adapters that are there now, and raises.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import nn

from adalora_dist.artifacts.adapted_model import adapt
from adalora_dist.config.methods import AdaLoraConfig, LowRankConfig
from adalora_dist.config.methods.peft_fields import Carried, kind_of, refuse_fields, settings_from_peft
from adalora_dist.io.errors import UserError
from adalora_dist.methods import method_for
from adalora_dist.methods.adalora.layers import TripletLayer
from adalora_dist.methods.adalora.method import TripletMethod
from adalora_dist.methods.adalora.start import RANKNUM_OFFSET, Triplets, decompose, refuse_other_functions
from adalora_dist.methods.protocol import adapters_of, carries_peft
from adalora_dist.methods.sites import find_sites, trained_modules
from adalora_dist.sharding.tensors import is_whole

_WHERE = "the model's adapter of PEFT"
_GONE = (
    *("save_pretrained", "push_to_hub", "disable_adapter", "merge_and_unload", "unload", "merge_adapter"),
    *("unmerge_adapter", "set_adapter", "add_adapter", "load_adapter", "delete_adapter"),
)
"""Methods of a ``PeftModel`` that are about its layers."""


class _Factors(NamedTuple):
    """Of one matrix, float32 on the CPU: A (r, d_in), B (d_out, r), E (r,) or None; ``scale`` multiplies B E A."""

    a: torch.Tensor
    b: torch.Tensor
    e: torch.Tensor | None
    scale: float

    def triplets(self, config: LowRankConfig) -> Triplets:
        """As ``config`` trains them. Where P begins at 0, weights stay what they are, and AdaLoRA's triplets that add
        nothing make room for fresh ones; where lambda does, LoRA's update goes through its SVD."""
        begins_with_lambda = isinstance(config, AdaLoraConfig) and config.start == "paper"
        factor = self.scale / config.scale
        if self.e is None:
            if begins_with_lambda:
                return decompose(self.b, self.a, factor)
            return Triplets(self.b * factor, torch.ones(len(self.a)), self.a)
        lam = self.e * factor
        used = torch.ones_like(lam, dtype=torch.bool) if begins_with_lambda else lam != 0
        return Triplets(self.b[:, used], lam[used], self.a[used])


def convert_peft(
    model: nn.Module, config: LowRankConfig | None = None, seed: int = 0, **settings: Any
) -> tuple[Any, LowRankConfig]:
    """Take PEFT's LoRA or AdaLoRA out of ``model`` and put adapters of this project's in, which compute the same.

    lora_B, lora_E and lora_A become P, lambda and Q; the scale of PEFT's layers goes into them where it is another.
    ``modules_to_save`` are trained on as they are.

    Args:
        model: a ``PeftModel``, or a model of transformers' that has PEFT's layers without it (``add_adapter``,
            ``inject_adapter_in_model``); not wrapped by an engine. It is used up: go on with what is returned.
        config: of the method adalora or lora, with the matrices that PEFT has adapted as targets; default: what PEFT's
            configuration says (:meth:`~adalora_dist.config.methods.AdaLoraConfig.from_peft`), for these matrices.
        seed: of fresh triplets, where init_rank is above a matrix's rank.
        settings: of AdaLoraConfig, without ``config``: ``start="matched"``; for LoRA a budget, ``target_rank=4``.

    Returns:
        The model of transformers' with adapters in it, and their settings, for ``AdaLoraCallback`` or ``attach``.

    Raises:
        UserError: no adapter of PEFT's or several, one that is no plain LoRA or AdaLoRA, merged, switched off, or
            sharded already; a ``config`` of other matrices, or too low a rank for them. The model is as it was.
    """
    found = _look_at(model)
    carried = Carried(list(found.factors), list(found.saved), max(len(f.a) for f in found.factors.values()))
    if config is None:
        config = AdaLoraConfig(**settings_from_peft(found.peft_config, settings, carried))
    elif settings:
        raise UserError(f"convert_peft: config and {min(settings)}={settings[min(settings)]!r}: give one of the two")
    method = method_for(config)
    if not isinstance(method, TripletMethod):
        raise UserError(f"convert_peft: method {config.method} has no triplets: must be adalora or lora")
    if carried.rank > config.init_rank:
        raise UserError(
            f"{_WHERE} has rank {carried.rank}, and init_rank is {config.init_rank}: set init_rank to at least "
            f"{carried.rank}"
        )
    for name, module in {**found.bases, **found.saved}.items():
        found.plain.set_submodule(name, module)
    said = found.plain.__dict__.pop("peft_config", None)
    try:
        _compare(found, config)
        layers = [layer for layer in adapt(found.plain, config, seed) if isinstance(layer, TripletLayer)]
    except UserError:
        for name, module in found.layers.items():
            found.plain.set_submodule(name, module)
        if said is not None:
            found.plain.peft_config = said
        raise
    method.begin_with(layers, {name: f.triplets(config) for name, f in found.factors.items()}, _WHERE)
    _forget(model, found.plain)
    return found.plain, config


class _Found(NamedTuple):
    plain: Any
    peft_config: Any
    layers: dict[str, nn.Module]
    """PEFT's modules by the names that they have in the plain model."""
    bases: dict[str, nn.Module]
    """What lies in those around linear maps."""
    saved: dict[str, nn.Module]
    """What is trained in those around modules that are trained in full."""
    factors: dict[str, _Factors]


def _look_at(model: nn.Module) -> _Found:
    """What PEFT has put into ``model``, if it can be converted."""
    if not carries_peft(model):
        raise UserError("the model has no adapters of PEFT's: for a plain one call adapt(model, config)")
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    configs = cast(Any, model).peft_config
    if adapters_of(model):
        raise UserError(
            "the model has PEFT's adapters (peft_config) besides those of adapt: leave peft_config out, or do not call "
            "adapt"
        )
    if len(configs) != 1:
        raise UserError(
            f"the model has {len(configs)} adapters of PEFT's ({', '.join(configs)}), must be 1: delete the others "
            "(model.delete_adapter), or, where TRL has added 'ref', call convert_peft before the Trainer is made"
        )
    [(adapter, peft_config)] = configs.items()
    refuse_other_functions(peft_config.to_dict(), kind_of(peft_config), _WHERE)
    refuse_fields(peft_config, is_carried=True)
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    found = _Found(plain, peft_config, {}, {}, {}, {})
    for name, module in plain.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            found.layers[name], found.saved[name] = module, module.modules_to_save[adapter]
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
                raise UserError(f"{_WHERE}: {name} is a {type(module).__name__}, not LoRA or AdaLoRA of a linear map")
            layer: Any = module
            found.layers[name], found.bases[name] = layer, layer.get_base_layer()
            found.factors[name] = _factors(name, module, adapter)
    if not found.factors:
        raise UserError(f"{_WHERE} has no layers: was it merged? Begin with the plain model, and adapt(model, config)")
    return found


def _factors(name: str, layer: Any, adapter: str) -> _Factors:
    if layer.merged:
        raise UserError(f"{_WHERE} is merged into {name}: call model.unmerge_adapter() first")
    if layer.disable_adapters or layer.active_adapters != [adapter]:
        raise UserError(f"{_WHERE} is switched off at {name}: call model.set_adapter({adapter!r}) first")
    a, b = (getattr(factor, "weight", factor) for factor in (layer.lora_A[adapter], layer.lora_B[adapter]))
    e = layer.lora_E[adapter] if hasattr(layer, "lora_E") else None
    if not all(is_whole(factor) for factor in (a, b, e) if factor is not None):
        raise UserError(f"{_WHERE} is sharded over processes at {name}: call convert_peft before an engine takes over")
    a, b = (factor.detach().float().cpu() for factor in (a, b))
    if e is None:
        return _Factors(a, b, None, layer.scaling[adapter])
    scale = layer.scaling[adapter] / (float(layer.ranknum[adapter]) + RANKNUM_OFFSET)
    return _Factors(a, b, e.detach().float().cpu().flatten(), scale)


def _compare(found: _Found, config: LowRankConfig) -> None:
    """Raise unless ``config`` adapts what PEFT has adapted, and trains what it has trained."""
    names, stacks = find_sites(found.plain, config)
    ours, theirs = {*names, *(stack.name for stack in stacks)}, found.factors.keys()
    for lacking, what in ((ours - theirs, "PEFT has not adapted"), (theirs - ours, "are not among the targets")):
        if lacking:
            raise UserError(
                f"targets={', '.join(config.targets):.80}: {len(lacking)} matrices ({', '.join(sorted(lacking)[:3])}) "
                f"{what}: name in targets what PEFT's target_modules matched, or leave config out"
            )
    if missing := sorted(found.saved.keys() - set(trained_modules(found.plain, config))):
        raise UserError(f"{missing[0]} is in PEFT's modules_to_save: name it in train_modules")


def _forget(model: Any, plain: Any) -> None:
    """Leave nothing that would speak of layers that are not there any more."""

    def gone(*args: Any, **options: Any) -> None:
        raise UserError("this PeftModel was converted: use the model that convert_peft gave back (trainer.model)")

    if hasattr(plain, "_hf_peft_config_loaded"):
        plain._hf_peft_config_loaded = False
    if model is not plain:
        for name in _GONE:
            setattr(model, name, gone)
