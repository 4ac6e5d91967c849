"""Packs: the trained parameters of a block as one flat parameter, for engines that pay for each parameter they have.

FSDP2 takes some five operations for a parameter in every step, ZeRO-3 some twenty, however small it is; a LLaMA block
has fourteen adapter parameters. Packed, an engine has one there, which it cuts as it likes: what a rank holds of P or
Q^T is a span as ever, and names, checkpoints and exports are those of the parts.

The flat parameter is the block's own, so both engines have it gathered while the block runs. For that time a part is a
view of it; otherwise it stands for itself, on the meta device, and :mod:`.tensors` and :mod:`.packed` know where its
numbers are. A checkpoint may run a block again in backward without calling it, so that no hook sees it; whoever asks
for a part within backward gets the view, and has to be of a block that backward has come to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import count as numbers
from itertools import groupby
from typing import Any, cast

import torch
from torch import nn

from adalora_dist.io.errors import UserError

LEAF = "packed_adapters"
"""What the flat parameters of a block are called in it, with a number behind."""


class Pack:
    """One flat parameter of ``block`` in the place of several parameters within it.

    Args:
        block: its forward begins and ends the time for which parts are views.
        places: (module, name) of each; of one type and device.
    """

    def __init__(self, block: nn.Module, places: Sequence[tuple[nn.Module, str]]) -> None:
        packs: dict[str, Pack] = block.__dict__.setdefault("adapter_packs", {})
        self.block, self.leaf = block, next(leaf for k in numbers() if (leaf := f"{LEAF}{k}") not in packs)
        self._is_running = False  # the block was called, and has not returned
        self._views: list[torch.Tensor] | None = None
        self._cut_in: tuple[int, bool] | None = None  # views: in which backward, -1: none; whether with gradients
        self._asked: set[int] = set()  # which of them have been
        # Equal shapes lie side by side: one operation cuts them all. By rows alone, which stay when columns go: a run
        # that continues after that has the order of one that was never stopped.
        self.places = sorted(places, key=lambda place: len(getattr(*place)))
        held = [cast(nn.Parameter, getattr(*place)) for place in self.places]
        flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in held]))
        self._lay_out([_part(self, p.shape) for p in held])
        for module, name in self.places:
            delattr(module, name)
        packs[self.leaf] = self
        block.register_parameter(self.leaf, flat)
        block.register_forward_pre_hook(self._begin)
        block.register_forward_hook(self._end, always_call=True)  # a checkpoint's second forward ends in an exception

    def _lay_out(self, parts: list[nn.Parameter]) -> None:
        self._drop()
        self.parts = parts
        """What stands for each, in order."""
        self.sizes = [part.numel() for part in parts]
        self._index = {place: k for k, place in enumerate(self.places)}
        self._shapes = [(shape, len(list(equal))) for shape, equal in groupby(part.shape for part in parts)]

    @property
    def flat(self) -> nn.Parameter:
        """The parameter as the engine has it now."""
        flat: nn.Parameter = getattr(self.block, self.leaf)
        return flat

    @property
    def is_at_hand(self) -> bool:
        """Whether the block runs, or may run again: the flat parameter can be read then."""
        return self._is_running or torch._C._current_graph_task_id() != -1

    def now(self, module: nn.Module, name: str) -> torch.Tensor:
        """A part: its numbers while the block runs, otherwise what stands for it."""
        index, task = self._index[module, name], torch._C._current_graph_task_id()
        if not self._is_running and task == -1:
            return self.parts[index]
        if self._views is None or self._cut_in != (task, torch.is_grad_enabled()):
            self._views, self._cut_in, self._asked = self._cut(), (task, torch.is_grad_enabled()), set()
        view = self._views[index]
        self._asked.add(index)
        if not self._is_running and len(self._asked) == len(self.parts):  # the block has run again, to its last layer
            self._drop()
        return view

    def part(self, module: nn.Module, name: str) -> nn.Parameter:
        """What stands for a part, whether the block runs or not, or was left by an interrupt, which no hook sees."""
        return self.parts[self._index[module, name]]

    def _cut(self) -> list[torch.Tensor]:
        views: list[torch.Tensor] = []
        chunks = self.flat.split([shape.numel() * count for shape, count in self._shapes])
        for chunk, (shape, count) in zip(chunks, self._shapes, strict=True):
            views += chunk.view(count, *shape).unbind() if count > 1 else [chunk.view(shape)]
        return views

    def _drop(self) -> None:
        self._views = None

    def _begin(self, *_: Any) -> None:
        self._is_running = True
        self._drop()  # what an engine gathers anew may lie elsewhere

    def _end(self, *_: Any) -> None:
        self._is_running = False
        self._drop()

    def check_at_hand(self, name: str) -> None:
        """Raise where ``name``, of which there are parts here, is computed and there are no numbers of them.

        Raises:
            UserError: the block's forward is not under way.
        """
        if not self.is_at_hand:
            raise UserError(
                f"{name} is computed outside of the forward of {type(self.block).__name__}, with whose adapters it is "
                "packed: set pack_adapters to false"
            )

    def index_of(self, part: torch.Tensor) -> int:
        """Which of :attr:`parts` it is."""
        return next(k for k, own in enumerate(self.parts) if own is part)

    def start(self, part: torch.Tensor) -> int:
        """Where a part begins in the flat parameter."""
        return sum(self.sizes[: self.index_of(part)])

    def left(self, columns: Mapping[tuple[nn.Module, str], torch.Tensor]) -> torch.Tensor:
        """Indices of what stays of the flat parameter where parts keep ``columns``; those that are not named, all."""
        kept = []
        indices = torch.arange(sum(self.sizes)).split(self.sizes)
        for place, part, own in zip(self.places, self.parts, indices, strict=True):
            kept.append(own if place not in columns else own.view(part.shape)[..., columns[place].cpu()].flatten())
        return torch.cat(kept)

    def shrink(self, columns: Mapping[tuple[nn.Module, str], torch.Tensor]) -> None:
        """The flat parameter is that of :meth:`left` now. A part without columns is gone, one that is cut another."""
        left: dict[tuple[nn.Module, str], nn.Parameter] = {}
        for place, part in zip(self.places, self.parts, strict=True):
            if place not in columns:
                left[place] = part
            elif len(columns[place]):
                left[place] = _part(self, torch.Size((*part.shape[:-1], len(columns[place]))))
            else:
                cast(Any, place[0]).packed.pop(place[1])
        self.places = list(left)
        self._lay_out(list(left.values()))
        if not left:
            packs_of(self.block).pop(self.leaf)

    def element(self, index: int) -> tuple[nn.Module, str, int]:
        """(module, name, index in the flattened part) of element ``index`` of the flat parameter."""
        for (module, name), size in zip(self.places, self.sizes, strict=True):
            if index < size:
                return module, name, index
            index -= size
        raise IndexError(index)


_WRITES = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


class _Part(nn.Parameter):
    """What stands for a part: its shape and type, no numbers."""

    pack: Pack

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What writes to one would be lost, and says nothing by itself.

        Raises:
            UserError: it does.
        """
        name = getattr(func, "__name__", "")
        writes = name in _WRITES or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")
        if writes and isinstance(args[0], _Part):
            raise UserError(
                f"{name} of a packed P or Q, which has numbers of its own while its block runs alone: set them before "
                "pack_adapters, or leave that out"
            )
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Of a model with its packs."""
        memo[id(self)] = copied = _part(copy.deepcopy(self.pack, memo), self.shape)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Likewise; the pack comes second, as it has the part in it."""
        return _blank, (self.shape,), self.pack

    def __setstate__(self, pack: Pack) -> None:
        self.pack = pack


def _part(pack: Pack, shape: torch.Size) -> nn.Parameter:
    part = _blank(shape)
    part.pack = pack
    return part


def _blank(shape: torch.Size) -> _Part:
    return _Part(torch.empty(shape, device="meta"))


def pack_of(tensor: torch.Tensor) -> Pack | None:
    """The pack that ``tensor`` stands for a part of."""
    return getattr(tensor, "pack", None)


def holder(tensor: torch.Tensor) -> torch.Tensor:
    """What an engine and an optimizer have in the place of ``tensor``: its pack's flat parameter, or itself."""
    pack = pack_of(tensor)
    return tensor if pack is None else pack.flat


def holders(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """:func:`holder` of all, each once, in order."""
    return list({id(held): held for held in map(holder, tensors)}.values())


def part_of(whole: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, of what its :func:`holder` is as a whole."""
    pack = pack_of(tensor)
    return whole if pack is None else whole.narrow(0, pack.start(tensor), tensor.numel()).view(tensor.shape)


def packs_of(module: nn.Module) -> dict[str, Pack]:
    """The packs whose flat parameters are ``module``'s own, by the names that those have in it."""
    packs: dict[str, Pack] = module.__dict__.get("adapter_packs", {})
    return packs
