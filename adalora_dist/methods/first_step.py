"""Does every adapter take part in what the model computes? Watched until the first optimizer step, on every engine.

What :mod:`adalora_dist.backbones.bypass` finds beforehand it finds in source code; a model whose code it cannot read,
or that computes a layer in a way it does not know, is caught here, before anything long has run: by hooks that note on
the host that an adapter was called, that a gradient came back to what it gave, and that the model asked it for its
base's weight. They read nothing from a device, and are gone after that step.

To take no part in one step is not wrong by itself: experts without tokens, layers that are dropped at random, attention
across to an encoder that is not there. It is said, and the run goes on. A weight that was read of an adapter that was
not called is an adapter that the model goes past.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from adalora_dist.io.errors import UserError
from adalora_dist.methods.adapter import Adapter
from adalora_dist.sharding.tensors import class_name


@dataclass
class Noted:
    """Names of adapters; plain data, as models with hooks are copied and pickled."""

    is_training: bool = False
    """Whether a forward of the whole model is under way, of which a graph is made."""
    went_back: bool = False
    """Whether a gradient came back to what it gave; otherwise gradients are given by hand, and nothing is known."""
    is_compiled: bool = False
    """Whether a compiler has traced an adapter: what it makes of it notes nothing."""
    called: set[str] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)
    """A gradient came back to their outputs."""
    read: set[str] = field(default_factory=set)
    """The model asked for their base's weight."""

    def enter(self, *_: Any) -> None:
        self.is_training = torch.is_grad_enabled()

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.is_training = False
        _hook_gradients(output, self._go_back)

    def after(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """A forward hook of the adapter ``name``."""
        if torch.compiler.is_compiling():
            self.is_compiled = True
        elif self.is_training or torch.is_grad_enabled():
            self.called.add(name)
            _hook_gradients(output, partial(self._reach, name))

    def _reach(self, name: str, gradient: torch.Tensor) -> None:
        self.reached.add(name)

    def _go_back(self, gradient: torch.Tensor) -> None:
        self.went_back = True


def _hook_gradients(output: Any, hook: Callable[[torch.Tensor], None]) -> None:
    if not torch.compiler.is_compiling():
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(hook)


class FirstStep:
    """The watch over the adapters of one model.

    Args:
        model: whose forward makes the loss; an engine may wrap it later, or have done so.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter]) -> None:
        self._model_class = class_name(model)
        self._adapters = [a for a in adapters if any(p.requires_grad for p in a.trained().values())]
        self._noted = noted = Noted()
        self._handles = [
            model.register_forward_pre_hook(noted.enter),
            model.register_forward_hook(noted.leave, always_call=True),
        ]
        for adapter in self._adapters:
            adapter.noted = noted
            self._handles.append(adapter.register_forward_hook(partial(noted.after, adapter.name)))

    def leave(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()
        for adapter in self._adapters:
            adapter.noted = None

    def end(self) -> str:
        """Gradients are there: look, and watch no longer.

        Returns:
            What takes no part, for the console; "": all do.

        Raises:
            UserError: the model goes past one, or none can learn.
        """
        self.leave()
        noted, names = self._noted, [adapter.name for adapter in self._adapters]
        if noted.is_compiled or not noted.went_back:
            return ""
        if past := [name for name in names if name in noted.read and name not in noted.called]:
            more = f" and of {len(past) - 1} more" if len(past) > 1 else ""
            leaves = ", ".join(sorted({name.rpartition(".")[2] for name in past}))
            raise UserError(
                f"{self._model_class} computes with the weight of {past[0]}{more} itself, and never calls the adapter "
                f"there, which can neither learn nor change anything: leave {leaves} out of targets"
            )
        idle = [name for name in names if name not in noted.reached]
        # Of experts alone, none may have been sent a token yet.
        if names and idle == names and (noted.called or not all("expert" in name for name in names)):
            what = "is called" if not noted.called else "gets a gradient"
            raise UserError(
                f"none of the {len(names)} adapters of {self._model_class} ({names[0]}, ...) {what} in the first step, "
                "so none can learn: name other targets, or set method to head"
            )
        if not idle:
            return ""
        leaves = ", ".join(sorted({name.rpartition(".")[2] for name in idle}))
        return (
            f"{len(idle)} of {len(names)} adapters ({leaves}; the first is {idle[0]}) had no part in this step: "
            "nothing of it went through them; what never has a part learns nothing"
        )
