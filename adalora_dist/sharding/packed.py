"""Packed parameters (``packing.py``) as any engine has them: what it says of a flat one, said of its parts.

The span of a part is the overlap of the flat one's with it, so all that sees spans sees no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from adalora_dist.io.errors import UserError
from adalora_dist.sharding.base import ShardEngine, Shrink, State, assemble
from adalora_dist.sharding.packing import Pack, holder, holders, pack_of
from adalora_dist.sharding.spans import Span, overlaps


class PackedEngine:
    """See :class:`adalora_dist.sharding.base.ShardEngine`.

    Args:
        params: parts of packs, and others.
        inner: the engine of :func:`~adalora_dist.sharding.packing.holders` of them.
    """

    shard_group: dist.ProcessGroup | None

    def __init__(self, params: Sequence[torch.Tensor], inner: ShardEngine) -> None:
        self._params, self._inner = list(params), inner
        self.shard_group, self.num_firings = inner.shard_group, inner.num_firings
        place = {id(held): k for k, held in enumerate(holders(params))}
        self._holder = [place[id(holder(p))] for p in params]
        packs = {place[id(pack.flat)]: pack for p in params if (pack := pack_of(p)) is not None}
        self._packs: dict[int, Pack] = packs
        self._part = [-1 if (pack := pack_of(p)) is None else pack.index_of(p) for p in params]
        self._inner_spans = inner.spans()
        self._part_spans = {k: overlaps(self._inner_spans[k], pack.sizes) for k, pack in packs.items()}
        self._lengths = {k: [span.stop - span.start for span in spans] for k, spans in self._part_spans.items()}
        self._addresses: list[int] = []
        self._views: list[torch.Tensor] = []

    @classmethod
    def claims(cls, params: Sequence[torch.Tensor], optimizer: Any) -> bool:
        return any(pack_of(p) is not None for p in params)

    def _cut(self, tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Of each parameter its part of what the inner engine says of the holders."""
        parts = {k: t.split(self._lengths[k]) for k in self._packs if (t := tensors[k]) is not None}
        return [
            tensors[k] if part < 0 else parts[k][part] if k in parts else None
            for k, part in zip(self._holder, self._part, strict=True)
        ]

    def spans(self) -> list[Span]:
        return [
            self._inner_spans[k] if part < 0 else self._part_spans[k][part]
            for k, part in zip(self._holder, self._part, strict=True)
        ]

    def values(self) -> list[torch.Tensor]:
        held = self._inner.values()
        addresses = [value.data_ptr() for value in held]
        if addresses != self._addresses:
            self._addresses = addresses
            self._views = [view for view in self._cut([v.detach() for v in held]) if view is not None]
        return list(self._views)

    def gradients(self) -> list[torch.Tensor | None]:
        return self._cut(self._inner.gradients())

    def nonfinite(self) -> torch.Tensor:
        return self._inner.nonfinite()

    def skip_firing_if(self, flag: torch.Tensor) -> None:
        self._inner.skip_firing_if(flag)

    def write(self, indices: Sequence[int], values: Sequence[torch.Tensor]) -> None:
        own = self.values()
        torch._foreach_copy_([own[k] for k in indices], list(values))
        held, changed = self._inner.values(), sorted({self._holder[k] for k in indices})
        self._inner.write(changed, [held[k] for k in changed])  # in every copy that the engine has

    def shapes(self) -> list[torch.Size]:
        inner = self._inner.shapes()
        return [
            inner[k] if part < 0 else p.shape for p, k, part in zip(self._params, self._holder, self._part, strict=True)
        ]

    def states(self) -> list[State]:
        inner = self._inner.states()
        made: list[State] = [{} for _ in self._params]
        for name in dict.fromkeys(name for state in inner for name in state):  # a set has another order in each process
            found = [state.get(name) for state in inner]
            is_step = name == "step"
            cut = [found[k] for k in self._holder] if is_step else self._cut(found)
            for state, value in zip(made, cut, strict=True):
                if value is not None:
                    state[name] = value
        return made

    def restore(self, values: Sequence[torch.Tensor], states: Sequence[State]) -> None:
        held = [value.detach().clone() for value in self._inner.values()]
        new_states = self._inner.states()
        own = [view for view in self._cut(held) if view is not None]
        for view, value in zip(own, values, strict=True):
            view.copy_(value.view_as(view))
        of_holders: dict[int, list[int]] = {}
        for index, k in enumerate(self._holder):
            of_holders.setdefault(k, []).append(index)
        for k, members in of_holders.items():
            new_states[k] = states[members[0]]
            if k in self._packs:
                new_states[k] = self._joined(k, {self._part[i]: states[i] for i in members})
        self._inner.restore(held, new_states)

    def _joined(self, k: int, states: dict[int, State]) -> State:
        """The state of a flat parameter, of those of all its parts."""
        steps = {float(state["step"]) if "step" in state else None for state in states.values()}
        if len(steps) > 1:
            raise UserError(
                f"{self._packs[k].leaf}: its parameters made different numbers of steps "
                f"({', '.join(sorted(map(str, steps)))}), and one that is packed has one count: set pack_adapters to "
                "false"
            )
        in_order = [states[part] for part in range(len(self._lengths[k]))]
        return {
            name: value if name == "step" else torch.cat([state[name].reshape(-1) for state in in_order])
            for name, value in in_order[0].items()
        }

    def neighbours(self) -> list[torch.Tensor]:
        held = {id(p) for p in self._params}
        others = [part for pack in self._packs.values() for part in pack.parts if id(part) not in held]
        return [*others, *self._inner.neighbours()]

    def shrink(self, model: nn.Module, optimizer: Any, shrinks: Sequence[Shrink]) -> None:
        with of_holders(shrinks) as own:
            self._inner.shrink(model, optimizer, own)

    def retire(self) -> None:
        self._inner.retire()

    def full(self, index: int) -> torch.Tensor:
        k, part = self._holder[index], self._part[index]
        if part < 0:
            return self._inner.full(k)
        local = self.values()[index].to(torch.float32)
        return assemble(local, self._part_spans[k][part], self._params[index].shape, self.shard_group)


@contextmanager
def of_holders(shrinks: Sequence[Shrink]) -> Iterator[list[Shrink]]:
    """Give what is to be done to the holders; afterwards the packs know what is left of their parts."""
    own: list[Shrink] = []
    columns: dict[int, dict[tuple[nn.Module, str], torch.Tensor]] = {}
    packs: dict[int, Pack] = {}
    for shrink in shrinks:
        if (pack := pack_of(shrink.parameter)) is None:
            own.append(shrink)
        else:
            packs[id(pack)] = pack
            columns.setdefault(id(pack), {})[shrink.module, shrink.name] = shrink.columns
    own += [Shrink(pack.block, pack.leaf, pack.left(columns[key])) for key, pack in packs.items()]
    yield own
    for key, pack in packs.items():
        pack.shrink(columns[key])


def select_columns(shrinks: Sequence[Shrink]) -> None:
    """Put what stays of parameters in their places. For those that no engine and no optimizer has taken over."""
    with of_holders(shrinks) as own:
        for shrink in own:
            shrink.select()
