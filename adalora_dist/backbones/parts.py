"""What a model is made of: its output heads, routers, and the towers of a multimodal one. Names of modules."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn

from adalora_dist.backbones.linears import linear_shape

_ROUTER_CLASS = re.compile(r".*(Router|Gating$|(?i:moe)\w*Gate$|TopK\w*Gate$)")
_GATE_NAMES = {"gate", "wg", "gating", "switch", "classifier"}
"""What routers that are plain linear maps are called, beside a module's experts."""


def backbone_of(model: nn.Module) -> nn.Module:
    """The model without its head: what transformers calls ``base_model``, the model itself where it is its own."""
    return getattr(model, "base_model", model)


def head_names(model: nn.Module) -> list[str]:
    """The children outside the backbone that have parameters.

    A model that is its own ``base_model`` (T5 for question answering, Whisper for audio classification) has the
    backbone's modules among its own: its head is what the plain model of its architecture does not have.
    """
    backbone = backbone_of(model)
    names = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    if backbone is not model:
        return [name for name in names if model.get_submodule(name) is not backbone]
    plain = _plain_class(model)
    if plain is None or isinstance(model, plain):
        return []
    with torch.device("meta"):  # of the class itself: from_config would partition it under ZeRO-3
        own = {name for name, _ in plain(copy.deepcopy(cast(Any, model).config)).named_children()}
    # A name that the two do not share says nothing where they share none.
    return [name for name in names if name not in own] if own.intersection(names) else []


def _plain_class(model: nn.Module) -> Any:
    """The class that ``AutoModel`` has for this architecture, if any."""
    from transformers import MODEL_MAPPING

    kind: Any = type(getattr(model, "config", None))
    found: Any = MODEL_MAPPING.get(kind, None)
    return found[0] if isinstance(found, tuple | list) else found


def output_modules(model: nn.Module) -> set[str]:
    """Names of every output head, also of models within the model (an encoder-decoder of two whole models)."""
    from transformers import PreTrainedModel

    found = set()
    for path, part in model.named_modules():
        if part is not model and not isinstance(part, PreTrainedModel):
            continue
        prefix, inner = f"{path}." if path else "", backbone_of(part)
        if part is model or (inner is not part and isinstance(inner, PreTrainedModel)):  # a stack of layers has none
            found |= {prefix + name for name in head_names(part)}
        get_head = getattr(part, "get_output_embeddings", None)
        if (head := get_head() if get_head is not None else None) is not None:
            found |= {prefix + name for name, module in part.named_modules() if module is head and name}
    return found


def router_names(model: nn.Module) -> list[str]:
    """What chooses experts, and gates that weigh a shared one: few outputs, on which all the rest hangs.

    By the class of the module, or by its name beside experts. Of nested ones, the outermost.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        if not name or is_under(name, found):
            continue
        is_router = _ROUTER_CLASS.fullmatch(type(module).__name__) is not None
        if not is_router and linear_shape(module) is not None:
            beside = [child for child, _ in model.get_submodule(parent).named_children()]
            is_gate = leaf in _GATE_NAMES and any("expert" in child for child in beside)
            is_router = is_gate or "router" in leaf.lower() or "expert_gate" in leaf
        if is_router:
            found.append(name)
    return found


def tower_names(model: nn.Module) -> list[str]:
    """Of a model that reads text and more: the modules that text does not pass through, encoders and projections.

    Empty for a model of text, and for one whose whole purpose is another input (ViT, Whisper).
    """
    from transformers import PreTrainedModel

    config = getattr(model, "config", None)
    if not getattr(config, "sub_configs", None) or "text" not in _modalities(model):
        return []
    parts = {
        path: part
        for path, part in model.named_modules()
        if path and isinstance(part, PreTrainedModel) and type(part.config) is not type(config)
    }
    towers = [path for path, part in parts.items() if "text" not in _modalities(part)]
    texts = [path for path, part in parts.items() if _modalities(part) == {"text"} and not is_under(path, towers)]
    if not towers or not texts:
        return towers
    kept = [*texts, *output_modules(model)]
    found: list[str] = []
    for path, _ in model.named_modules():
        around = path == "" or any(name.startswith(f"{path}.") for name in kept)
        if not around and not is_under(path, kept) and not is_under(path, found):
            found.append(path)
    return found


def _modalities(model: nn.Module) -> set[str]:
    named = getattr(model, "input_modalities", "text")
    return {named} if isinstance(named, str) else set(named)


def is_under(path: str, roots: Iterable[str]) -> bool:
    """Whether a module is one of ``roots``, or within one."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """What tokens enter by; None where there is no such module, as in CANINE, which hashes characters."""
    try:
        found: nn.Module | None = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None
    return found


def outermost(model: nn.Module, is_one: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The modules of a kind, in order, without those that lie in others of it."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():  # what contains comes first
        if module not in inside and is_one(module):
            found.append(module)
            inside.update(module.modules())
    return found
