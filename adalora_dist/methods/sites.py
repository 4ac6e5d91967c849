"""Where adapters go, and what is trained beside them: names of modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from adalora_dist.backbones.bypass import weights_read_directly
from adalora_dist.backbones.experts import ExpertStack, stacks_of
from adalora_dist.backbones.linears import is_plain_linear, linear_shape
from adalora_dist.backbones.names import new_backbone_modules
from adalora_dist.backbones.parts import backbone_of, head_names, is_under, output_modules, router_names, tower_names
from adalora_dist.config.methods import MethodConfig, TargetsConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adapter import Adapter

A = TypeVar("A", bound=Adapter)


def trained_modules(model: nn.Module, config: MethodConfig) -> list[str]:
    """Names of the modules that ``train_modules`` asks for; ``task-head`` stands for all modules outside the backbone,
    and for those at its end that its files lack, such as the pooler of a masked language model.

    Raises:
        UserError: a name that matches nothing; ``task-head`` where the model is a backbone alone, or where its head is
            tied to the embeddings.
    """
    matched = []
    if explicit := tuple(pattern for pattern in config.train_modules if pattern != "task-head"):
        matched = matching_modules(model, explicit, "train_modules")
    if "task-head" not in config.train_modules:
        return matched
    heads = head_names(model)
    if not heads:
        raise UserError(f"train_modules=task-head: {type(model).__name__} has nothing outside its backbone")
    inside = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if not is_under(name, heads)}
    for name in heads:
        if any(id(p) in inside for p in model.get_submodule(name).parameters()):
            raise UserError(
                f"train_modules=task-head: {name} is tied to the backbone's embeddings, which would be trained, too: "
                "leave task-head out of train_modules"
            )
    return [*matched, *heads, *new_backbone_modules(model)]


def find_targets(model: nn.Module, targets: tuple[str, ...], setting: str = "targets") -> list[str]:
    """Names of the linear maps that ``targets`` asks for, in the order of ``model.named_modules()``.

    For methods that adapt linear maps alone: all-linear leaves stacks of experts as they are.

    Args:
        setting: what users call it, for messages.

    Raises:
        UserError: as :func:`find_sites`; a target is a stack of experts.
    """
    names, stacks = _chosen(model, targets, setting)
    if stacks and "all-linear" not in targets or "experts" in targets:
        what = stacks[0].name if stacks else "experts"
        raise UserError(
            f"{setting}: {what} is adapted by the methods adalora and lora alone: leave experts out of {setting}, or "
            "set method to adalora or lora"
        )
    return _checked(model, names, [], setting)


def find_sites(model: nn.Module, config: TargetsConfig) -> tuple[list[str], list[ExpertStack]]:
    """Names of the linear maps, and the stacks of experts, that ``targets`` asks for, as ``model.named_modules()`` has
    them. all-linear takes both, but for stacks that ``train_modules`` trains in full; experts all that the model's are
    made of. Whether the model is frozen already makes no difference.

    Raises:
        UserError: a pattern that matches nothing, or something that is no linear map, is shared between two places, or
            has a weight tied to another module's.
    """
    names, stacks = _chosen(model, config.targets, "targets", trained_modules(model, config))
    return _checked(model, names, stacks, "targets"), stacks


def _chosen(
    model: nn.Module, targets: tuple[str, ...], setting: str, trained: Collection[str] = ()
) -> tuple[list[str], list[ExpertStack]]:
    """The modules, which may be no linear maps, and the stacks of experts that are asked for.

    Args:
        trained: modules that are trained in full.
    """
    if any(isinstance(module, Adapter) for module in model.modules()):
        raise UserError("the model already has adapters: inject into the plain backbone")
    stacks, matched, chosen = stacks_of(model), set[str](), set[str]()
    if "all-linear" in targets:
        left = left_out(model)
        whole = [*trained, *output_modules(model)]
        chosen |= {stack.name for stack in stacks if not is_under(stack.owner, whole)}
        matched |= set(_all_linear(model, left, has_stacks=bool(chosen)))
    if "experts" in targets:
        within = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "experts"]
        routers = router_names(model)  # JetMoE's lie within
        maps = {name for name in _linear_maps(model) if is_under(name, within) and not is_under(name, routers)}
        if not stacks and not maps:
            raise UserError(f"{setting}: {type(model).__name__} has no experts that can be adapted: leave experts out")
        matched, chosen = matched | maps, chosen | {stack.name for stack in stacks}
    for pattern in targets:
        if pattern in ("all-linear", "experts"):
            continue
        found = [stack for stack in stacks if _matches(pattern, stack.name) or _matches(pattern, stack.owner)]
        chosen |= {stack.name for stack in found}
        owners = {stack.owner for stack in found}
        if not found or any(_matches(pattern, name) and name not in owners for name, _ in model.named_modules()):
            matched |= set(matching_modules(model, (pattern,), setting)) - owners
    names = [name for name, _ in model.named_modules() if name in matched]
    return names, [stack for stack in stacks if stack.name in chosen]


def _checked(model: nn.Module, names: list[str], stacks: Sequence[ExpertStack], setting: str) -> list[str]:
    """``names``, if an adapter can serve them and the stacks."""
    matched = {*names, *(stack.owner for stack in stacks)}
    owners: dict[int, str] = {}
    targeted = {id(model.get_submodule(name)): name for name in matched}
    for name, module in model.named_modules(remove_duplicate=False):
        if targeted.get(id(module), name) != name:
            raise UserError(
                f"{setting}: {name} and {targeted[id(module)]} are one shared module; an adapter there would count "
                f"twice: leave both out of {setting}"
            )
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            other = owners.setdefault(id(parameter), name)
            if other != name and (name in matched or other in matched):
                raise UserError(
                    f"{setting}: the weight of {name} is tied to {other}; merging an adapter would change both: "
                    f"leave {name if name in matched else other} out of {setting}"
                )
    for name in names:
        module = model.get_submodule(name)
        if linear_shape(module) is None or not is_plain_linear(module):
            raise UserError(
                f"{setting}: {name} is a {type(module).__name__}, not a linear map (nn.Linear, Conv1D or a quantised "
                f"linear): leave it out of {setting}"
            )
    for name, where in weights_read_directly(model, names).items():
        raise UserError(
            f"{setting}: the model computes with the weight of {name} itself (in {where}), past an adapter there: "
            f"leave {name.rpartition('.')[2]} out of {setting}"
        )
    return names


def target_shapes(model: nn.Module, targets: tuple[str, ...]) -> list[tuple[int, int]]:
    """(d_in, d_out) of each of :func:`find_targets`; raises as that."""
    return [linear_shape(model.get_submodule(name)) or (0, 0) for name in find_targets(model, targets)]


def site_shapes(model: nn.Module, config: TargetsConfig) -> list[tuple[int, int]]:
    """(d_in, d_out) of each matrix of :func:`find_sites`, every expert's too; raises as that."""
    names, stacks = find_sites(model, config)
    shapes = [linear_shape(model.get_submodule(name)) or (0, 0) for name in names]
    return shapes + [(stack.d_in, stack.d_out) for stack in stacks for _ in range(stack.num_experts)]


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}") or re.fullmatch(pattern, name) is not None


def _all_linear(model: nn.Module, left: Mapping[str, str], has_stacks: bool) -> list[str]:
    """Every linear map of the backbone but those of :func:`left_out`.

    Output heads (lm_head, classifiers) are outside the backbone, and are left alone.
    """
    names = [name for name in _linear_maps(model) if name not in left]
    if not names and not has_stacks:
        kinds = sorted(set(left.values()) - {"heads"})
        why = f" but {', '.join(kinds)}: name what to adapt" if kinds else ""
        raise UserError(f"targets='all-linear': {type(backbone_of(model)).__name__} has no linear maps{why}")
    return names


def left_out(model: nn.Module) -> dict[str, str]:
    """The linear maps that all-linear does not adapt, and what they are: {name: kind}, kinds as in ``shares``.

    Explicit targets may name all but the last two, which an adapter cannot serve.
    """
    names = _linear_maps(model)
    heads, towers, routers = output_modules(model), tower_names(model), router_names(model)
    new = new_backbone_modules(model)  # random: trained in full, or refused
    found = {}
    for name in names:
        if is_under(name, heads):
            found[name] = "heads"
        elif is_under(name, new):
            found[name] = "not in the files"
        elif is_under(name, towers):
            found[name] = "vision and audio"
        elif is_under(name, routers):
            found[name] = "routers"
        elif not is_plain_linear(model.get_submodule(name)):
            found[name] = "linear maps of another kind"
    rest = [name for name in names if name not in found]
    return found | dict.fromkeys(weights_read_directly(model, rest), "linear maps whose weight the model reads itself")


def _linear_maps(model: nn.Module) -> list[str]:
    backbone = backbone_of(model)
    prefix = next((f"{name}." for name, module in model.named_modules() if module is backbone and name), "")
    return [
        prefix + name
        for name, module in backbone.named_modules()
        if linear_shape(module) is not None and not list(module.children())
    ]


def matching_modules(model: nn.Module, patterns: tuple[str, ...], field: str) -> list[str]:
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


def put_around(model: nn.Module, targets: Iterable[str], make: Callable[[nn.Module, str], A]) -> list[A]:
    """Put what ``make`` gives for (base, name) in the place of each target, in their order."""
    layers = []
    for name in targets:
        base = model.get_submodule(name)
        base.requires_grad_(False)  # it may lie in a module of train_modules
        layers.append(put_in_place(model, make(base, name)))
    return layers


def put_in_place(model: nn.Module, layer: A) -> A:
    """Replace the layer's base by the layer."""
    layer.train(layer.base.training)
    parent, _, child = layer.name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    return layer


def train_in_place(method: str, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Make (name, parameter) of the backbone trainable.

    Raises:
        UserError: one is not float32.
    """
    for name, parameter in parameters:
        if parameter.dtype != torch.float32:
            raise UserError(
                f"method={method}: {name} is {parameter.dtype}, in which small updates are rounded away: set dtype to "
                "float32"
            )
        parameter.requires_grad_(True)
