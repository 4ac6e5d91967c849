"""``SVDLinear``, a frozen linear map plus the adapter P diag(lambda) Q, and ``Lambdas``, lambda of all of them.

Every layer needs P diag(lambda) in a forward. :class:`Lambdas` multiplies for many at once. It has, from when on and
until when:

- nothing until a forward, after ``release`` (weights change), and after a backward;
- lambda in parts, from a forward's first adapted layer on;
- products from the first layer on that has P at hand: of all layers where no engine shards P (one process, DDP, ZeRO-1,
  ZeRO-2), of a block where FSDP2 has gathered it. Each until its layer takes it: from then on it is the graph's, which
  drops it as backward passes the layer. A layer that runs again (tied; a checkpoint's second run) has it made again.

A layer multiplies its own P by its part of lambda where P is not at hand (ZeRO-3; a block of FSDP2's that is compiled,
and given the part before it gathers), where no gradient is wanted, and under a compiler, which fuses what it sees.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from adalora_dist.backbones.linears import is_conv1d
from adalora_dist.backbones.merging import Mergeable
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.products import times_lambdas
from adalora_dist.methods.adalora.widening import Ragged, Widening
from adalora_dist.methods.adapter import device_of, lora_start
from adalora_dist.methods.dropout import Dropout
from adalora_dist.methods.protocol import Adapter, TrainedModule
from adalora_dist.sharding.tensors import is_whole


class TripletLayer(Adapter):
    """The adapters P diag(lambda) Q of one matrix, or of several that are one parameter of the model.

    Parameters (float32, trainable; the paper's names):
        P: (d_out, r), with a column for every triplet, matrix after matrix.
        Qt: (d_in, r), Q transposed. Engines shard dimension 0; with the long axis there, both Gram matrices P^T P
            and Q Q^T are sums over the rows that a rank holds.

    ``lam`` is this layer's part of the model's one vector of lambdas; a :class:`Lambdas` takes the layer into it and
    must exist before the first forward.

    ``rank`` is the number of triplets held now, ``triplets`` says which of the ``init_rank`` original ones they are:
    compaction removes the others, and the scale does not follow. With r = 0 there is no branch and no parameter.

    Args:
        name: what is adapted, in the plain model: engines and compilers change module paths.
        ranks: of each matrix at the start.
        device: of the parameters.
    """

    can_be_off = True
    lambdas: Lambdas
    first: int
    """Where this layer's triplets begin in ``lambdas.lam``."""
    position: int
    """Which of the layers with triplets it is, counted from 0."""
    given: torch.Tensor | None = None  # while a compiled block runs: what ``Lambdas.part`` gave before it was called

    def __init__(
        self, name: str, d_in: int, d_out: int, ranks: Sequence[int], scale: float, dropout: float, device: torch.device
    ) -> None:
        super().__init__()
        self.name, self.d_in, self.d_out, self.scale = name, d_in, d_out, scale
        self.init_ranks, self.init_rank = tuple(ranks), sum(ranks)
        self.rank, self.triplets = self.init_rank, tuple(range(self.init_rank))
        self.dropout = Dropout(dropout) if dropout else None
        if self.rank:
            self.P = nn.Parameter(torch.empty(d_out, self.rank, dtype=torch.float32, device=device))
            self.Qt = nn.Parameter(torch.empty(d_in, self.rank, dtype=torch.float32, device=device))

    @property
    def lam(self) -> torch.Tensor:
        """(r,), a view: what is written to it under ``no_grad`` is the model's. Not while an engine shards lambda."""
        return self.lambdas.lam[self.first : self.first + self.rank]

    @property
    def ranks(self) -> list[int]:
        """Triplets held now of each matrix."""
        ends = [bisect_left(self.triplets, stop) for stop in accumulate(self.init_ranks)]
        return [end - start for start, end in pairwise([0, *ends])]

    def held(self) -> list[int]:
        return list(self.triplets)

    def ragged(self) -> tuple[Ragged, Ragged] | None:
        """P and Qt as they are now, if its forward wants matrices that are equally wide and they are not."""
        return None

    @property
    def part_size(self) -> int:
        return self.d_out + self.d_in + int(self.lambdas.lam.requires_grad)

    @torch.no_grad()
    def reset(self, generator: torch.Generator, std: float | None = 0.02) -> None:
        """P, Q ~ N(0, std^2), std None: 1/sqrt(d), so that columns have unit length on average.

        Drawn on the CPU, so that every device, rank and engine starts from the same numbers.
        """
        for x in (self.P, self.Qt):
            x.copy_(torch.randn(x.shape, generator=generator) * (std if std is not None else x.shape[0] ** -0.5))

    @torch.no_grad()
    def reset_as_lora(self, generator: torch.Generator) -> None:
        """Plain LoRA's start: B = P = 0; A = Q ~ U(-a, a), a = 1/sqrt(d_in), PyTorch's linear init.

        It goes with lambda = 1, which whoever makes the :class:`Lambdas` sets.
        """
        self.P.zero_()
        self.Qt.copy_(lora_start(self.Qt.shape, self.d_in, generator))

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"


class SVDLinear(TripletLayer, Mergeable):
    """``y = base(x) + scale * P (lam * (Q x))`` over any base module that maps (..., d_in) to (..., d_out).

    The base is called, never opened: ``nn.Linear``, transformers' ``Conv1D`` and quantised linears are alike. The
    branch computes in the type of the base's output.
    """

    can_be_packed = True

    def __init__(
        self, base: nn.Module, d_in: int, d_out: int, rank: int, scale: float, dropout: float = 0.0, name: str = ""
    ) -> None:
        super().__init__(name, d_in, d_out, (rank,), scale, dropout, device_of(base))
        self.base = base

    def description(self) -> dict[str, Any]:
        sizes = {"d_out": self.d_out, "d_in": self.d_in, "init_rank": self.init_rank}
        return sizes | {"scale": self.scale, "is_transposed": is_conv1d(self.base)}

    @torch.no_grad()
    def added(self) -> torch.Tensor | None:
        return self.lambdas.weight(self).float() @ self.Qt.T.float() if self.rank else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Two dimensions from here on, so that the add below is in place on the base's own output: no extra pass over
        # [tokens, d_out], and no view whose in-place backward would copy.
        tokens = x.reshape(-1, self.d_in)
        y: torch.Tensor = self.base(tokens)
        if self.rank and self.takes_part():
            # lam goes into P, not into the hidden values: backward then needs one (tokens, r) tensor, as LoRA's does.
            weight = self.lambdas.weight(self).to(y.dtype)
            if self.dropout is None:
                hidden = tokens.to(y.dtype) @ self.Qt.to(y.dtype)  # (tokens, r)
            else:
                hidden = self.dropout.product(tokens, self.Qt, y.dtype)
            y = y.addmm_(hidden.to(y.dtype), weight.T)  # under autocast the product has its type, whatever y has
        return y.view(*x.shape[:-1], self.d_out)


MODULE_NAME = "adalora"
"""Under which the adapted model has its :class:`Lambdas`."""
LAMBDAS_NAME = f"{MODULE_NAME}.lam"
"""Under which files and reports have its parameter, whatever an engine does to paths."""


class Lambdas(TrainedModule):
    """The paper's diagonals Lambda of all adapted matrices, one behind the other, in one parameter.

    One vector of a few thousand numbers instead of hundreds of vectors of a dozen: an engine communicates it, and an
    optimizer steps it, at once. Its gradient, too, is made at once. The first adapted layer of a forward multiplies P
    and lambda of all matrices, in one operation; backward comes to that operation last, when it has the gradients of
    all products. FSDP2 never has all P at once; there it is those of a block. ZeRO-3 has one layer's.

    Parameter:
        lam: (num_triplets,) float32, 0 when made; a method sets it to 1 where P starts at 0. Either way the adapted
            model starts as the plain one.

    Args:
        layers: the adapted layers in canonical order. They ask their ``lambdas`` for their weight from now on.
    """

    lam: nn.Parameter

    def __init__(self, layers: Sequence[TripletLayer]) -> None:
        super().__init__()
        self.layers = tuple(layers)  # in a tuple: they are submodules of the model, not of this one
        device = next((layer.P.device for layer in layers if layer.rank), None)
        self.lam = nn.Parameter(torch.zeros(sum(layer.rank for layer in layers), dtype=torch.float32, device=device))
        self.index()
        for layer in layers:
            layer.__dict__["lambdas"] = self  # past nn.Module, for the same reason

    def index(self) -> None:
        """Ranks have changed: see where each layer's triplets lie in ``lam`` now."""
        self._active = [layer for layer in self.layers if layer.rank]
        first = 0
        for position, layer in enumerate(self._active):
            layer.position, layer.first = position, first
            first += layer.rank
        ragged = {layer.position: factors for layer in self._active if (factors := layer.ragged()) is not None}
        self._widening = Widening([factor for factors in ragged.values() for factor in factors])
        self._widening_of = {position: Widening(factors) for position, factors in ragged.items()}
        scales = [layer.scale for layer in self._active]
        self._scale: float | list[float] = [s for s, x in zip(scales, self._active, strict=True) for _ in range(x.rank)]
        if len(set(scales)) == 1:  # as always in training; adapters from elsewhere may have one per matrix
            self._scale = scales[0]
        self.release()

    def release(self) -> None:
        """Forget what was multiplied for the last forward: P or lambda are about to change, or have."""
        self._parts: list[torch.Tensor] | None = None  # scale * lambda of each layer, (r,)
        self._products: list[torch.Tensor | None] = []  # those that were made, until their layers take them
        self._wide: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._is_whole, self._edits_then = False, [0]

    def __getstate__(self) -> dict[str, Any]:
        """Without the products of a forward: their graph can be neither copied nor pickled."""
        return {**self.__dict__, "_parts": None, "_products": [], "_wide": {}}

    def trained(self) -> dict[str, nn.Parameter]:
        return {LAMBDAS_NAME: self.lam} if self.lam.requires_grad else {}

    def element_name(self, leaf: str, index: int) -> str:
        """Named after the matrix whose lambda it is."""
        return f"{next(layer.name for layer in self._active if index < layer.first + layer.rank)}.{leaf}"

    def forward(self) -> torch.Tensor:
        """lambda times each matrix's scale, (num_triplets,). A call of the module, so that engines can gather it."""
        if isinstance(self._scale, list):
            return self.lam * self.lam.new_tensor(self._scale)
        # A number written this way is not kept as a tensor, which the first of two backwards would free.
        scaled: torch.Tensor = torch.ops.aten.mul.Scalar(self.lam, self._scale)
        return scaled

    def weight(self, layer: TripletLayer) -> torch.Tensor:
        """scale * P diag(lambda) of one layer, (d_out, r)."""
        part = self.part(layer) if layer.given is None else layer.given
        return part if part.ndim == 2 else layer.P * part

    def part(self, layer: TripletLayer) -> torch.Tensor:
        """scale * P diag(lambda) of one layer, (d_out, r); its scale * lambda, (r,), where P is not at hand or no
        gradient is wanted."""
        for pack in layer.packed.values():
            pack.check_at_hand(layer.name)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler fuses what is written out
            return self._own(layer)
        is_backward, position = torch._C._current_graph_task_id() != -1, layer.position  # in a checkpoint's second run
        if self._parts is None or (self._is_whole and self._edits(layer) != self._edits_then[position]):
            if is_backward:
                own = self._own(layer)
                return times_lambdas([own], [layer.P])[0] if _is_at_hand(layer, layer) else own
            self._begin(layer)
        assert self._parts is not None
        if not _is_at_hand(layer, layer):
            return self._parts[position]
        if self._products[position] is None:
            self._make(position, 1 if is_backward and self._is_whole else len(self._active))
        made = self._products[position]
        assert made is not None
        if not (self._is_whole and position in self._widening_of):  # those are widened together
            self._products[position] = None
        return made

    def factors(self, layer: TripletLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """scale * P diag(lambda) and Qt of one layer, their matrices equally wide where its forward wants them so."""
        weight, position = self.weight(layer), layer.position
        if position not in self._widening_of:
            return weight, layer.Qt
        if not self._is_whole or not self._products or weight is not self._products[position]:
            wide, qt = self._widening_of[position]([weight, layer.Qt])
            return wide, qt
        if not self._wide:
            ragged = [self._active[k] for k in self._widening_of]
            made = self._widening([factor for x in ragged for factor in (self.weight(x), x.Qt)])
            self._wide = dict(zip(self._widening_of, zip(made[::2], made[1::2], strict=True), strict=True))
        return self._wide[position]

    def _own(self, layer: TripletLayer) -> torch.Tensor:
        lams: torch.Tensor = self()
        return lams[layer.first : layer.first + layer.rank]

    def _edits(self, layer: TripletLayer) -> int:
        return layer.P._version + layer.Qt._version + self.lam._version

    def _begin(self, first: TripletLayer) -> None:
        """Of a forward: its lambdas.

        Args:
            first: the layer that runs now, and has its parameters gathered.
        """
        scaled, self._wide = self(), {}
        self._parts = [*scaled.split([layer.rank for layer in self._active])]
        self._products = [None] * len(self._active)
        # FSDP2's P are sharded until their block has gathered them. ZeRO-3 would gather those of other layers here if
        # they were as much as looked at, so the first one decides.
        self._is_whole = all(_is_at_hand(layer, first) and not layer.packed for layer in (first, *self._active))
        if self._is_whole:
            self._edits_then = [self._edits(layer) for layer in self._active]
            self._make(0, len(self._active))  # whichever layer a forward begins with: a decoder's come before
        if scaled.requires_grad:
            scaled.register_hook(lambda _: self.release())

    def _make(self, first: int, most: int) -> None:
        """The products of the layer at position ``first`` and of those after it, while they have none and P is there.

        Args:
            most: layers.
        """
        if not self._is_whole:
            # Another block runs, or this one again. What is left of an earlier run goes back to P as gathered then.
            self._products = [None] * len(self._active)
        stop = first + 1
        while stop < min(first + most, len(self._active)) and self._products[stop] is None:
            if not (self._is_whole or _is_at_hand(self._active[stop], self._active[first])):
                break
            stop += 1
        assert self._parts is not None
        ps = [layer.P for layer in self._active[first:stop]]
        self._products[first:stop] = times_lambdas(self._parts[first:stop], ps)


def _is_at_hand(layer: TripletLayer, beside: TripletLayer) -> bool:
    """Whether all of P can be read now, where ``beside`` runs: for good, or because its block has been gathered."""
    if (pack := layer.packed.get("P")) is not None:
        return pack is beside.packed.get("P")
    return type(layer.P) is nn.Parameter and is_whole(layer.P)


def ranks_of(layers: Sequence[TripletLayer]) -> dict[str, int]:
    """The triplets held now of every matrix, by its name."""
    return {name: rank for layer in layers for name, rank in zip(layer.matrix_names(), layer.ranks, strict=True)}


def add_lambdas(model: nn.Module, layers: Sequence[TripletLayer]) -> Lambdas:
    """Give ``layers``, all that the model has, their lambdas: one vector, on the model itself.

    Raises:
        UserError: the name is taken.
    """
    if hasattr(model, MODULE_NAME):
        raise UserError(f"{type(model).__name__} has an attribute {MODULE_NAME!r} already: adapters need that name")
    if any(p.requires_grad and p.dtype != torch.float32 for p in model.parameters()):
        # FSDP2 wants one type of what is trained in a group. Here lambda would meet others in the root's: accelerate
        # makes groups of these classes.
        model._no_split_modules = {*(getattr(model, "_no_split_modules", None) or ()), Lambdas.__name__}  # type: ignore[assignment]
    lambdas = Lambdas(layers)
    model.add_module(MODULE_NAME, lambdas)
    return lambdas
