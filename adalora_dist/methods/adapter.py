"""``Adapter``: a module of a method's in a model, and names of its parameters that no engine changes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from adalora_dist.io.errors import UserError
from adalora_dist.sharding.packing import Pack, packs_of
from adalora_dist.sharding.tensors import full_numel, full_shape


class TrainedModule(nn.Module):
    """A module of a method's that holds trained parameters: an adapter, or what several adapters share."""

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters held here now, by the names that files have, whatever an engine does to paths."""
        raise NotImplementedError(f"{type(self).__name__}.trained")

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """What lies in this module itself, by its name there."""
        return dict(self.named_parameters(recurse=False))

    def element_name(self, leaf: str, index: int) -> str:
        """What a person calls element ``index`` of the flattened parameter ``leaf``, for messages."""
        raise NotImplementedError(f"{type(self).__name__}.element_name")


_OWN_MARKS = ("weights_on_disk", "plain_name")
"""What the package itself puts on a model's modules."""


class Adapter(TrainedModule):
    """A module in the place of, or around, one of the model's; or beside it, as those of experts are.

    The base is called, never opened; all that the adapter does not hold itself is frozen.

    The adapter answers its base's attributes (``weight``, ``in_features``, what a quantised linear has): model code
    asks for them, as T5 does for ``wo.weight.dtype``. They are no parameters of the adapter. Code that computes with
    such a weight goes past the adapter: :mod:`adalora_dist.backbones.bypass` finds it beforehand, and
    :mod:`adalora_dist.methods.first_step` in the first step.
    """

    name: str
    """The name that what is adapted has in the plain model. (Engines and compilers change module paths.)"""
    base: nn.Module
    """None is there in an adapter beside a module."""
    noted: Any = None
    """While the first step is watched, where it is noted that the model has asked for the base's weight."""
    can_be_off: ClassVar[bool] = False
    """Whether its forward asks ``takes_part``."""
    is_on: bool = True
    """False: what is adapted computes alone (:func:`without_adapters`)."""
    can_be_packed: ClassVar[bool] = False
    """Whether its forward reads its parameters within that of its block alone, and as attributes."""
    packed: Mapping[str, Pack] = MappingProxyType({})
    """Its parameters that lie in a pack of its block's, by name: an attribute as before."""

    def takes_part(self) -> bool:
        """Whether a forward has the adapter in it.

        Raises:
            RuntimeError: it is off where gradients are wanted, as in a checkpoint's second forward, which has to
                compute what the first did.
        """
        if not self.is_on and torch.is_grad_enabled():
            raise RuntimeError(f"{self.name}: a forward with gradients within without_adapters: go backward after it")
        return self.is_on

    def __getattr__(self, name: str) -> Any:
        """Look up in the base what the adapter lacks: data alone, neither methods nor the marks of engines.

        A method of the base would compute without the adapter, and an engine must not take its mark on the base for
        one on the adapter.
        """
        if (pack := self.packed.get(name)) is not None:
            return pack.now(self, name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name.startswith(("_", "ds_")) or name in _OWN_MARKS:
                raise
            value = getattr(base, name, self)
            if value is self or inspect.ismethod(value):
                raise
            if name == "weight" and self.noted is not None and self.noted.is_training:
                self.noted.read.add(self.name)
            return value

    def trained(self) -> dict[str, nn.Parameter]:
        return {f"{self.name}.{leaf}": p for leaf, p in self.own_parameters().items()}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        packed = {leaf: pack.part(self, leaf) for leaf, pack in self.packed.items()}
        return packed | super().own_parameters()

    def element_name(self, leaf: str, index: int) -> str:
        return f"{self.name}.{leaf}"

    def description(self) -> dict[str, Any]:
        """What an export needs to know besides the parameters: sizes, scale; plain data."""
        raise NotImplementedError(f"{type(self).__name__}.description")

    def past(self) -> dict[str, torch.Tensor]:
        """What it has learnt that its parameters do not hold any more, whole, on the CPU, by the names that
        :meth:`~adalora_dist.methods.protocol.Method.updates` asks for."""
        return {}

    @property
    def path(self) -> str:
        """Where it lies itself in the adapted model, before an engine changes paths."""
        return self.name

    def matrix_names(self) -> list[str]:
        """Names of the matrices that it adapts, each with a rank of its own: one, of the adapter's name."""
        return [self.name]

    def adapts(self) -> list[tuple[nn.Module, str]]:
        """(module, name of its parameter) of everything that is adapted."""
        return [
            (module, leaf)
            for module in self.base.modules()
            for leaf, parameter in module.named_parameters(recurse=False)
            if leaf == "weight" or len(full_shape(parameter)) > 1
        ]

    def held(self) -> list[int]:
        """Which of its parts (triplets) are left, as ascending indices into those at the start of the run.

        By default it is one part, which stays.
        """
        return [0]

    @property
    def part_size(self) -> int:
        """How many trained numbers one of its parts has."""
        return sum(full_numel(p) for p in self.own_parameters().values())


def device_of(base: nn.Module) -> torch.device:
    """Where the parameters of an adapter of ``base`` are made. A base on meta is read later, adapters have values."""
    return next((p.device for p in base.parameters() if not p.is_meta), torch.device("cpu"))


def lora_start(shape: Sequence[int], num_read: int, generator: torch.Generator) -> torch.Tensor:
    """As LoRA starts A, drawn on the CPU: U(-a, a), a = 1/sqrt(num_read), PyTorch's linear init."""
    drawn: torch.Tensor = (2 * torch.rand(*shape, generator=generator) - 1) * num_read**-0.5
    return drawn


def adapters_of(model: nn.Module) -> list[Adapter]:
    """The adapters that a model has, in canonical order."""
    return [module for module in model.modules() if isinstance(module, Adapter)]


def carries_peft(model: nn.Module) -> bool:
    """Whether PEFT has put layers into a model, or lies around it."""
    return hasattr(model, "peft_config")


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let ``model`` compute what it did before there were adapters, as the reference of a preference or reward loss.

    Without gradients, so that importance does not see it. Under FSDP2 and ZeRO-3 all processes compute together.

    Args:
        model: may be wrapped by an engine.

    Raises:
        UserError: there is no adapter, its method knows no such thing, or something is trained besides, which has
            no other values to go back to.
    """
    adapters = adapters_of(model)
    if not adapters:
        raise UserError("the model has no adapters to switch off")
    if stays := next((adapter for adapter in adapters if not adapter.can_be_off), None):
        raise UserError(f"{stays.name}: a {type(stays).__name__} cannot be switched off: load the plain model beside")
    if besides := next((plain_path(name) for name, _ in others_trained(model)), None):
        raise UserError(
            f"{besides} is trained in full, and its first values are gone: without adapters the model would not be the "
            "plain one; load that beside"
        )
    before = [adapter.is_on for adapter in adapters]
    try:
        for adapter in adapters:
            adapter.is_on = False
        with torch.no_grad():
            yield
    finally:
        for adapter, was_on in zip(adapters, before, strict=True):
            adapter.is_on = was_on


_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def plain_path(path: str) -> str:
    """The path of a module or parameter without what engines, compilers and checkpointing put into it."""
    path = path.removeprefix("module.")
    for wrapper in _WRAPPERS:
        path = path.replace(wrapper, "")
    return path


def trained_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """All trainable parameters as the model holds them now, by names that no engine changes."""
    own = {
        id(p): name
        for module in model.modules()
        if isinstance(module, TrainedModule)
        for name, p in module.trained().items()
    }
    packs = {id(pack.flat): pack for module in model.modules() for pack in packs_of(module).values()}
    found: dict[str, torch.Tensor] = {}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            pack = packs.get(id(parameter))
            for part in [parameter] if pack is None else pack.parts:
                name = own.get(id(part))
                found[plain_path(path) if name is None else name] = part
    return found


def others_trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the plain model, parameter) of what is trained besides adapters, of an unwrapped model.

    A tied weight comes under each of its names.
    """
    for path, module in model.named_modules():
        if not isinstance(module, TrainedModule):
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and leaf not in packs_of(module):
                    yield (f"{path}.{leaf}" if path else leaf), parameter
