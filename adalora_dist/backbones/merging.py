"""Adapters merged into the weights of what they adapt, for as long as texts are generated.

A decoding step is many small operations, and an adapter adds six to those of its matrix. A merged one adds none: the
weight is W + U, and the layer does what its base does. Afterwards every weight comes back from a copy, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from adalora_dist.backbones.linears import has_readable_weight, is_packed, is_plain_linear, weight_of
from adalora_dist.io.errors import UserError
from adalora_dist.sharding.tensors import is_whole


class Mergeable(nn.Module):
    """A layer ``y = base(x) + U x`` that can say what U is.

    A subclass with another ``forward`` computes something else, unless it has an ``added`` of its own as well.
    """

    base: nn.Module

    def added(self) -> torch.Tensor | None:
        """U (d_out, d_in), float32, detached, of parameters that are whole; None: 0."""
        raise NotImplementedError(f"{type(self).__name__}.added")

    @classmethod
    def is_said(cls) -> bool:
        """Whether :meth:`added` is of this forward: written in the class with it, or in a subclass of that."""
        added, forward = (next(kind for kind in cls.__mro__ if name in vars(kind)) for name in ("added", "forward"))
        return issubclass(added, forward)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """In it every layer of :func:`mergeable_in` is merged; in no other process than this one.

    The weights lie in host memory a second time meanwhile.
    """
    with ExitStack() as undo:
        for layer in mergeable_in(model):
            undo.enter_context(_merged(layer))
        yield


def mergeable_in(model: nn.Module) -> list[Mergeable]:
    """The layers whose base is a plain linear map with a weight of its own, whole on this process and not packed."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))

    def can(layer: Mergeable) -> bool:
        base: Any = layer.base
        is_here = all(is_whole(p) and not p.is_meta for p in layer.parameters())
        is_plain = is_here and not is_packed(base) and has_readable_weight(base) and is_plain_linear(base)
        return is_plain and owners[id(base.weight)] == 1

    return [m for m in model.modules() if isinstance(m, Mergeable) and m.is_said() and can(m)]


def check_mergeable(model: nn.Module) -> None:
    """Raise a ``UserError`` if :func:`merged` would merge nothing."""
    if not mergeable_in(model):
        raise UserError(
            "merge_to_generate true: there is nothing to merge, which takes adapters of adalora or lora around weights "
            "that are whole in every process (one process, DDP, ZeRO-1, ZeRO-2) and not quantised; leave it out"
        )


@contextmanager
def _merged(layer: Mergeable) -> Iterator[None]:
    weight, added = weight_of(layer.base), layer.added()
    before = None if added is None else weight.to("cpu", copy=True)
    try:
        if added is not None:
            weight.copy_(added.add_(weight))
        with forward_of(layer, layer.base):
            yield
    finally:
        if before is not None:
            weight.copy_(before)


@contextmanager
def forward_of(module: nn.Module, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """In it ``module`` does ``forward``, between the same hooks as before."""
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own
