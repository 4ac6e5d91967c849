"""``Lambdas``: lambda of all adapted matrices as one vector, and every P diag(lambda) from one operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from adalora_dist.layers import SVDLinear

MODULE_NAME = "adalora"
"""Of the :class:`Lambdas` among the adapted model's children."""
LAMBDAS_NAME = f"{MODULE_NAME}.lam"
"""Of its parameter, under every engine."""


class Lambdas(nn.Module):
    """The paper's diagonals Lambda of all adapted matrices, one behind the other, in one parameter.

    One vector of a few thousand numbers instead of hundreds of vectors of a dozen: an engine communicates it, and an
    optimizer steps it, at once. So is its gradient made: a matrix whose P is whole gets P diag(lambda) from one
    operation over all matrices, at the first adapted layer of a forward, and backward returns from there last.
    Engines that shard P within a model (FSDP2, ZeRO-3) never hold all of them; there each layer multiplies its own.

    Parameter:
        lam: (num_triplets,) float32, 0 when made; ``inject_adapters`` sets it to 1 where P starts at 0. Either way the
            adapted model starts as the plain one.

    Args:
        layers: the adapted layers in canonical order. They ask their ``lambdas`` for their weight from now on.
    """

    lam: nn.Parameter

    def __init__(self, layers: Sequence[SVDLinear]) -> None:
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
        scales = [layer.scale for layer in self._active]
        self._scale: float | list[float] = [s for s, x in zip(scales, self._active, strict=True) for _ in range(x.rank)]
        if len(set(scales)) == 1:  # as always in training; adapters from elsewhere may have one per matrix
            self._scale = scales[0]
        self.release()

    def release(self) -> None:
        """Forget what was multiplied for the last forward: P or lambda are about to change, or have."""
        self._made: list[torch.Tensor] | None = None
        self._is_whole, self._edits_then = False, [0]

    def __getstate__(self) -> dict[str, Any]:
        """Without the products of a forward: their graph can be neither copied nor pickled."""
        return {**self.__dict__, "_made": None}

    def matrix_of(self, index: int) -> str:
        """The name of the matrix that an element of ``lam`` belongs to."""
        return next(layer.name for layer in self._active if index < layer.first + layer.rank)

    def forward(self) -> torch.Tensor:
        """lambda times each matrix's scale, (num_triplets,). A call of the module, so that engines can gather it."""
        if isinstance(self._scale, list):
            return self.lam * self.lam.new_tensor(self._scale)
        # A number written this way is not kept as a tensor, which the first of two backwards would free.
        return torch.ops.aten.mul.Scalar(self.lam, self._scale)

    def weight(self, layer: SVDLinear) -> torch.Tensor:
        """scale * P diag(lambda) of one layer, (d_out, r)."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # a compiler fuses what is written out
            return layer.P * self._own(layer)
        if self._made is None or (self._is_whole and self._edits(layer) != self._edits_then[layer.position]):
            if torch._C._current_graph_task_id() != -1:  # a checkpoint's second forward, within backward, on its own
                return layer.P * self._own(layer)
            self._make(layer)
        assert self._made is not None
        made = self._made[layer.position]
        return made if self._is_whole else layer.P * made

    def _own(self, layer: SVDLinear) -> torch.Tensor:
        return self()[layer.first : layer.first + layer.rank]

    def _edits(self, layer: SVDLinear) -> int:
        return layer.P._version + self.lam._version

    def _make(self, first: SVDLinear) -> None:
        """For this forward, every layer's weight, or where P are sharded its part of lambda times scale.

        Args:
            first: the layer that runs now, and has its parameters gathered.
        """
        scaled = self()
        ranks = [layer.rank for layer in self._active]
        # FSDP2's P are DTensors until their block has gathered them. ZeRO-3 marks its parameters; it would gather
        # those of other layers here if they were as much as looked at, so the first one decides.
        self._is_whole = all(type(x.P) is nn.Parameter and not hasattr(x.P, "ds_id") for x in (first, *self._active))
        if self._is_whole:
            self._edits_then = [self._edits(layer) for layer in self._active]
            self._made = list(_Multiply.apply(self, scaled, ranks, *(layer.P for layer in self._active)))
        else:
            self._made = list(scaled.split(ranks))
            if scaled.requires_grad:
                scaled.register_hook(lambda _: self.release())


class _Multiply(torch.autograd.Function):
    """All P diag(lambda), from the vector of lambdas and all P.

    Nothing is kept as a saved tensor, so that two forwards may share it and go backward one after the other.
    """

    @staticmethod
    def forward(ctx: Any, owner: Lambdas, lams: torch.Tensor, ranks: list[int], *ps: torch.Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.owner, ctx.ps, ctx.lams, ctx.versions = owner, ps, lams.split(ranks), [p._version for p in ps]
        return tuple(torch._foreach_mul(ps, ctx.lams))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:  # type: ignore[override]
        ctx.owner.release()
        if ctx.versions != [p._version for p in ctx.ps]:
            raise RuntimeError("an adapter's P was changed between a forward and its backward: go backward first")
        used = [k for k, g in enumerate(gradients) if g is not None]
        if not used:
            return (None,) * (3 + len(ctx.ps))
        ps, lams, arrived = ([x[k] for k in used] for x in (ctx.ps, ctx.lams, cast(tuple[torch.Tensor], gradients)))
        of_ps: list[torch.Tensor | None] = [None] * len(ctx.ps)
        for k, g in zip(used, torch._foreach_mul(arrived, lams), strict=True):
            of_ps[k] = g
        of_lams = None
        if ctx.needs_input_grad[1]:
            made = dict(zip(used, lambda_gradients(ps, arrived), strict=True))
            of_lams = torch.cat([made[k] if k in made else torch.zeros_like(lam) for k, lam in enumerate(ctx.lams)])
        return None, of_lams, None, *of_ps


def lambda_gradients(ps: list[torch.Tensor], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """dL/dlambda of each matrix, (r,), from P and the gradient of P diag(lambda), both (d_out, r): sum_j P_ji G_ji.

    Matrices of equal d_out lie side by side, so that the number of operations is that of the sizes, not of matrices.
    """
    products = torch._foreach_mul(ps, gradients)
    members: dict[int, list[int]] = {}
    for k, p in enumerate(ps):
        members.setdefault(len(p), []).append(k)
    found: dict[int, torch.Tensor] = {}
    for of_size in members.values():
        sums = torch.cat([products[k] for k in of_size], dim=1).sum(dim=0)
        found.update(zip(of_size, sums.split([ps[k].shape[1] for k in of_size]), strict=True))
    return [found[k] for k in range(len(ps))]
