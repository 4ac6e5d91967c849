"""Importance of triplets and the selection of the b best. Pure functions on plain tensors.

Source: AdaLoRA (arXiv 2303.10512), eqs. 7-10 for the scores, eq. 5 for the selection. Nothing here knows about
ranks or process groups: averages are element-wise, and scores are sums over elements, so the partial scores of
any partition of the elements add up to the scores of the whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

ImportanceKind = Literal["sensitivity_uncertainty", "sensitivity", "magnitude"]

_CHUNK = 2**17  # elements that a CPU core works on at a time: the three vectors then stay in its cache
_MAGNITUDE = 0x7FFFFFFF  # the bits of a float32 but its sign


class Vectors(NamedTuple):
    """Arguments of :func:`update_averages`, (num_elements,) each."""

    sensitivity: torch.Tensor
    uncertainty: torch.Tensor
    products: torch.Tensor
    bits: torch.Tensor
    """int32, the memory of ``products``."""


class Shares(NamedTuple):
    """What a step's products count in the averages, made once a step."""

    of_sensitivity: float | torch.Tensor
    """1 - beta1; as a tensor (scalar), 0 in a step that is left out."""
    of_uncertainty: float | torch.Tensor
    """1 - beta2, the like."""
    bits: torch.Tensor | None
    """int32 scalar, of a float32 the bits that its absolute value keeps: all but the sign, none in a step that is left
    out, whose products may be nan. None: no step is left out."""


def shares_of(beta1: float, beta2: float, skip: torch.Tensor | None = None) -> Shares:
    """Arguments as of :func:`update_averages`."""
    if skip is None:
        return Shares(1 - beta1, 1 - beta2, None)
    first = torch.rsub(skip, 1 - beta1, alpha=1 - beta1)
    second = first if beta2 == beta1 else torch.rsub(skip, 1 - beta2, alpha=1 - beta2)
    return Shares(first, second, torch.rsub(skip.int(), _MAGNITUDE, alpha=_MAGNITUDE))


def update_averages(
    sensitivity: torch.Tensor,  # (num_elements,) float32, I-bar, updated in place
    uncertainty: torch.Tensor,  # (num_elements,) float32, U-bar, updated in place
    products: torch.Tensor,  # (num_elements,) w dL/dw of this optimizer step; scratch from here on
    beta1: float,
    beta2: float,
    skip: torch.Tensor | None = None,  # scalar: 1 leaves both averages as they are, bit for bit, else 0
    compiled: bool = False,  # in one kernel
) -> None:
    """Advance the smoothed sensitivity and uncertainty by one step (eqs. 8-10), without bias correction.

    I = |w g|;  I-bar <- beta1 I-bar + (1 - beta1) I;  U-bar <- beta2 U-bar + (1 - beta2) |I - I-bar|, with the
    updated I-bar. Products that are not finite may come with ``skip`` only.
    """
    vectors = Vectors(sensitivity, uncertainty, products, products.view(torch.int32))
    advance_averages(vectors, shares_of(beta1, beta2, skip), compiled)


def advance_averages(vectors: Vectors, shares: Shares, compiled: bool) -> None:
    """The same, of a step whose shares are known."""
    if compiled:
        compiled_advance()(*vectors[:3], *map(torch.as_tensor, shares[:2]))
        return
    chunked = vectors.products.device.type == "cpu" and len(vectors.products) > _CHUNK
    chunks = zip(*(v.split(_CHUNK) for v in vectors), strict=True) if chunked else [vectors]
    for i_bar, u_bar, instant, bits in chunks:
        if shares.bits is None:
            instant.abs_()
        else:
            bits.bitwise_and_(shares.bits)
        i_bar.lerp_(instant, shares.of_sensitivity)
        u_bar.lerp_(instant.sub_(i_bar).abs_(), shares.of_uncertainty)


def advance(
    sensitivity: torch.Tensor,
    uncertainty: torch.Tensor,
    products: torch.Tensor,
    share1: torch.Tensor,
    share2: torch.Tensor,
) -> None:
    """One step of :func:`update_averages`, written for a compiler: three reads and two writes per element.

    ``share``: 1 - beta, or 0 to leave the averages as they are, bit for bit, whatever the products.
    """
    instant = products.abs()
    instant = torch.where(instant < torch.inf, instant, 0.0)  # nan is not below either
    updated = sensitivity + share1 * (instant - sensitivity)
    uncertainty.add_(share2 * ((instant - updated).abs() - uncertainty))
    sensitivity.copy_(updated)


@functools.cache
def compiled_advance() -> Callable[..., None]:
    """:func:`advance` as one kernel, built when it is first called with tensors of a size."""
    return torch.compile(advance, dynamic=False, fullgraph=True)


def element_scores(
    kind: ImportanceKind, sensitivity: torch.Tensor, uncertainty: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """Write s(w) per element (eq. 9, or the sensitivity alone) to ``out``, of the inputs' shape; returns it."""
    if kind == "sensitivity_uncertainty":
        return torch.mul(sensitivity, uncertainty, out=out)
    if kind == "sensitivity":
        return out.copy_(sensitivity)
    raise ValueError(f"importance {kind!r} is not a sum over elements")


class Selection(NamedTuple):
    """What stays; both on the device of the scores."""

    keep: torch.Tensor
    """(num_triplets,) bool."""
    lowest_score: torch.Tensor
    """Of those that stay, scalar; infinite where none does."""


def best_first(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(num_triplets,) scores from the largest down, equal ones in canonical order, and their indices; nan is lowest."""
    return torch.sort(scores.nan_to_num(-torch.inf, torch.inf, -torch.inf), descending=True, stable=True)


def select(scores: torch.Tensor, budget: int) -> Selection:
    """Keep exactly ``budget`` of the triplets, those with the largest scores (eq. 5).

    Args:
        scores: (num_triplets,) in the canonical order, matrix by matrix. A nan counts as the lowest score.
        budget: in 0..num_triplets.

    Equal scores are kept in canonical order, so the result is deterministic.
    """
    ordered, indices = best_first(scores)
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, indices[:budget], True)
    return Selection(keep, ordered[budget - 1] if budget else ordered.new_full((), torch.inf))


def local_budgets(ranks: list[int], budget: int) -> list[int]:
    """Split ``budget`` over matrices in equal shares (the paper's local ablation).

    A share never exceeds a matrix's rank; what is left over goes one by one to the first matrices with room. The
    shares add up to ``budget``, which must lie in 0..sum(ranks).
    """
    shares = [0] * len(ranks)
    left = budget
    while left > 0:
        open_matrices = [k for k, rank in enumerate(ranks) if shares[k] < rank]
        equal = max(1, left // len(open_matrices))
        for k in open_matrices:
            taken = min(equal, ranks[k] - shares[k], left)
            shares[k] += taken
            left -= taken
    return shares


def select_local(scores: torch.Tensor, ranks: list[int], budget: int) -> Selection:
    """Keep ``budget`` triplets with an equal share for every matrix. Arguments and result as in :func:`select`."""
    shares = local_budgets(ranks, budget)
    owners = [k for k, rank in enumerate(ranks) for _ in range(rank)]
    matrices = torch.tensor(owners, dtype=torch.long).to(scores.device)
    is_kept = [i < share for rank, share in zip(ranks, shares, strict=True) for i in range(rank)]
    order = best_first(scores)[1]
    by_matrix = order[torch.sort(matrices[order], stable=True).indices]  # matrix after matrix, best first in each
    kept = torch.tensor(is_kept, dtype=torch.bool).to(scores.device)
    keep = torch.zeros_like(kept).scatter_(0, by_matrix, kept)
    return Selection(keep, torch.where(keep, scores, torch.inf).min())
