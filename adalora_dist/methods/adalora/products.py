"""P diag(lambda) of all matrices in one operation, and its gradient: of lambda, too, at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from adalora_dist.sharding.tensors import awaits_gradient

_SIDE_BY_SIDE = 2**22  # elements, 16 MiB
_CACHED = 2**17  # elements at most on a CPU: products then stay in a core's cache until they are summed


def times_lambdas(lams: Sequence[torch.Tensor], ps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """P diag(lambda) of every matrix, (d_out, r).

    Nothing is kept as a saved tensor: to a checkpoint's second run it is the same whether it finds products or makes
    them.

    Args:
        lams: (r,) of each matrix.
    """
    multiply: Callable[..., tuple[torch.Tensor, ...]] = _Multiply.apply
    if torch._C._current_graph_task_id() == -1:
        return list(multiply(*lams, *ps))
    # Within backward, for a checkpoint: the selective kind looks up what it sees in the first run, which may have found
    # products. All are plain tensors here.
    with torch._C._DisableTorchDispatch():
        return list(multiply(*lams, *ps))


class _Multiply(torch.autograd.Function):
    """All P diag(lambda), from the lambdas of all matrices and then all P."""

    @staticmethod
    def forward(ctx: Any, *factors: torch.Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.lams, ctx.ps = factors[: len(factors) // 2], factors[len(factors) // 2 :]
        ctx.versions = [p._version for p in ctx.ps]
        return tuple(torch._foreach_mul(ctx.ps, ctx.lams))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        if ctx.versions != [p._version for p in ctx.ps]:
            raise RuntimeError("an adapter's P was changed between a forward and its backward: go backward first")
        if any(p.untyped_storage().nbytes() == 0 for p in ctx.ps):  # reading it would be a crash
            raise RuntimeError("an adapter's P was given up before its backward: keep FSDP2's blocks gathered for it")
        used = [k for k, g in enumerate(gradients) if g is not None]
        # Where no gradient came back there is none, but for an engine that would stumble over it.
        of_ps: list[torch.Tensor | None] = [
            torch.zeros_like(p) if g is None and awaits_gradient(p) else None
            for p, g in zip(ctx.ps, gradients, strict=True)
        ]
        of_lams: list[torch.Tensor | None] = [None] * len(ctx.lams)
        if not used:
            return *of_lams, *of_ps
        ps, lams, arrived = ([x[k] for k in used] for x in (ctx.ps, ctx.lams, cast(tuple[torch.Tensor], gradients)))
        if ctx.needs_input_grad[0]:
            for k, of_lam in zip(used, lambda_gradients(ps, arrived), strict=True):
                of_lams[k] = of_lam
        # In their place: each has come from the one matrix product that used it, and P's gradients are as large as P.
        torch._foreach_mul_(arrived, lams)
        for k, g in zip(used, arrived, strict=True):
            of_ps[k] = g
        return *of_lams, *of_ps


def lambda_gradients(ps: list[torch.Tensor], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """dL/dlambda of each matrix, (r,), from P and the gradient of P diag(lambda), both (d_out, r): sum_j P_ji G_ji.

    Matrices of equal d_out lie side by side, so that the number of operations is that of the sizes, not of matrices;
    above ``_SIDE_BY_SIDE`` elements they do so part by part, for the sake of memory, on a CPU above ``_CACHED``.
    """
    members: dict[int, list[int]] = {}
    for k, p in enumerate(ps):
        members.setdefault(len(p), []).append(k)
    parts = [list(range(len(ps)))]
    most = min(_SIDE_BY_SIDE, _CACHED) if ps[0].device.type == "cpu" else _SIDE_BY_SIDE
    if sum(p.numel() for p in ps) > most:
        parts = []
        for of_size in members.values():
            count = max(1, most // max(ps[k].numel() for k in of_size))
            parts += [of_size[first : first + count] for first in range(0, len(of_size), count)]
    found: dict[int, torch.Tensor] = {}
    for part in parts:
        products = dict(zip(part, torch._foreach_mul([ps[k] for k in part], [gradients[k] for k in part]), strict=True))
        for of_size in ([k for k in all_of_size if k in products] for all_of_size in members.values()):
            if of_size:
                of_parts = [products[k] for k in of_size]
                sums = (of_parts[0] if len(of_parts) == 1 else torch.cat(of_parts, dim=1)).sum(dim=0)
                found.update(zip(of_size, sums.split([ps[k].shape[1] for k in of_size]), strict=True))
    return [found[k] for k in range(len(ps))]
