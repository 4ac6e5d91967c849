"""What PEFT makes of an adapter that was written for it, found out by loading it: around a base without weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.start import PREFIX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT = "prompt_embeddings"
"""What PEFT's files call a prefix."""
_EXPERT_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""What PEFT looks for at the end of target_modules, in models with stacked experts."""


def has_peft() -> bool:
    """Whether adapters can be verified here."""
    return find_spec("peft") is not None


def not_verified(model: PreTrainedModel | None) -> str:
    """Why an adapter that was written with this model could not be verified, for the console; empty if it was."""
    if model is None:
        return "not verified by loading it: the base's config.json cannot be had, or names no class of transformers"
    return "" if has_peft() else "not verified by loading it: PEFT is not installed (pip install peft)"


def taken_for_experts(names: Sequence[str], model: PreTrainedModel | None) -> list[str]:
    """Those of the adapted modules that PEFT takes for experts, whose maps transformers has stacked in one tensor.

    It goes by the end of a module's name (mlp.up_proj) and so finds dense and shared layers of such models, too.
    Without PEFT here, every module of such a name counts where there are experts.
    """
    if model is None:
        return []
    candidates = [name for name in names if name.rpartition(".")[2] in _EXPERT_NAMES]
    has_experts = any(p.dim() == 3 and ".experts." in name for name, p in model.named_parameters())
    if not candidates or not has_experts or not has_peft():
        return candidates if has_experts else []
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    taken = []
    for name in candidates:
        config = LoraConfig(target_modules=[name, *(n for n in names if n not in candidates)])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # one of two that would be fused, alone
            taken.append(name)
        else:
            if name not in (config.target_modules or ()):
                taken.append(name)
    return taken


def verify(
    folder: Path,
    model: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
    trained: Sequence[str] = (),
    target: Path | None = None,
    parameters: Mapping[str, str] | None = None,
) -> None:
    """Load an adapter with PEFT and compare what it has at every matrix with what was written.

    Does nothing where PEFT is not installed.

    Args:
        folder: of the adapter.
        model: its plain base on the meta device; a copy gets the adapter.
        tensors: all that was written, by its name in the file.
        trained: parameters that were written whole.
        target: the folder's name in errors, where it has another while it is built.
        parameters: by the path of an adapter of a stack of experts, which of the module's parameters it is of.

    Raises:
        UserError: PEFT does not load it, drops a tensor, puts one elsewhere, or scales it differently.
    """
    if not has_peft():
        return
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = _without_memory(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they would say is found out below
            loaded = PeftModel.from_pretrained(model, folder)
    except Exception as error:  # any of PEFT's
        reason = " ".join(str(error).split())[:200]
        raise _refusal(target or folder, f"it stops with {type(error).__name__}: {reason}") from error
    folder = target or folder
    layers = {n.removeprefix(PREFIX): m for n, m in loaded.named_modules() if isinstance(m, BaseTunerLayer)}
    expected: dict[str, dict[str, torch.Tensor]] = {}
    whole = {PREFIX + name for name in trained}
    for key, tensor in tensors.items():
        if key not in whole and key.startswith(PREFIX):  # what all matrices share is compared at each of them
            name, _, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
            expected.setdefault(name, {})[kind] = tensor
    if other := sorted(layers.keys() ^ expected.keys()):
        raise _refusal(folder, f"{other[0]} has an adapter in one of the two alone")
    shared = {key.rpartition(".")[2]: t for key, t in tensors.items() if not key.startswith(PREFIX)}
    for name, parameter in (parameters or {}).items():
        if (found_there := getattr(layers[name], "parameter_name", None)) != parameter:
            raise _refusal(folder, f"{name} is an adapter of {found_there}, not of {parameter}")
    encoders: Any = getattr(loaded, "prompt_encoder", None)
    if PROMPT in tensors and not _is_same(encoders["default"].embedding.weight, tensors[PROMPT]):
        raise _refusal(folder, "the prefix does not arrive")
    for name, factors in expected.items():
        _compare(folder, name, layers[name], factors | shared)
    found: dict[str, torch.Tensor] = dict(loaded.named_parameters())
    for name in trained:
        owner, _, leaf = name.rpartition(".")
        places = [
            k for k in found if k.endswith(f".{leaf}") and k.replace("modules_to_save.default.", "") == PREFIX + name
        ]
        if not any("modules_to_save" in k and _is_same(found[k], tensors[PREFIX + name]) for k in places):
            raise _refusal(folder, f"{name}, which was trained in full, does not arrive")


def _without_memory(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose parameters are one number each, on the CPU, seen in their shapes: PEFT follows a base's device."""
    copy = deepcopy(model)
    for module in copy.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            seen = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, leaf, nn.Parameter(seen, requires_grad=False))
    return copy


def _compare(folder: Path, name: str, layer: Any, factors: Mapping[str, torch.Tensor]) -> None:
    for kind, tensor in factors.items():
        held: Any = getattr(layer, kind)
        holder: Any = held["default"] if "default" in held else None
        value = getattr(holder, "weight", holder)  # a linear map's, or AdaLoRA's parameter itself
        if value is None or not _is_same(value, tensor):
            raise _refusal(folder, f"{kind} of {name} does not arrive")
    is_lora = "lora_A" in factors and "lora_E" not in factors
    if is_lora and (scaling := layer.scaling["default"]) != 1:
        raise _refusal(folder, f"{name} is scaled by {scaling:g}, not by 1")


def _is_same(value: torch.Tensor, tensor: torch.Tensor) -> bool:
    return value.shape == tensor.shape and torch.equal(value.detach().cpu().float(), tensor.float())


def _refusal(folder: Path, reason: str) -> UserError:
    return UserError(f"{folder}: PEFT would load this adapter as another function ({reason}): use the merged model")
