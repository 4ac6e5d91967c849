"""The mathematics of GaLore, on plain tensors. No process group, no engine.

G (m x n) is a gradient. On the right side R = G V with V (n x r), on the left R = U^T G with U (m x r). V and U are
the singular vectors of G of its r largest singular values; both are called P here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

Side = Literal["left", "right"]

EXACT_UP_TO = 4096
"""Length of the projected side up to which projector auto is exact: a Gram matrix of 128 MiB."""
OVERSAMPLING = 8
"""Directions that the randomised iteration carries besides the r wanted."""
NUM_PASSES = 3
"""Products with G^T G in the randomised iteration; what ``torch.svd_lowrank`` makes with ``niter=2``."""


def side_of(shape: tuple[int, int], projection: str) -> Side:
    """The side that is projected: with std the shorter, of a square matrix the right (as the authors' code)."""
    if projection == "std":
        return "right" if shape[0] >= shape[1] else "left"
    return "left" if projection == "left" else "right"


def is_exact(projector: str, shape: tuple[int, int], side: Side) -> bool:
    """Whether P comes from a whole Gram matrix, (n x n) on the right, (m x m) on the left."""
    return projector == "exact" or (projector == "auto" and shape[side == "right"] <= EXACT_UP_TO)


def project(gradient: torch.Tensor, p: torch.Tensor, side: Side) -> torch.Tensor:
    """R: (m, r) on the right, (r, n) on the left. Linear in G: of rows alone, those of R, or their part of it."""
    return gradient @ p if side == "right" else p.T @ gradient


def project_back(reduced: torch.Tensor, p: torch.Tensor, side: Side) -> torch.Tensor:
    """An update of R's shape in G's: (m, n)."""
    return reduced @ p.T if side == "right" else p @ reduced


def gram(gradient: torch.Tensor, side: Side) -> torch.Tensor:
    """G^T G (n x n) on the right, a sum over rows; G G^T (m x m) on the left; float64.

    Eigenvalues are squares of singular values: in float64 that costs nothing of what a float32 gradient knows.
    """
    wide = gradient.double()
    return wide.T @ wide if side == "right" else wide @ wide.T


def leading(symmetric: torch.Tensor, rank: int) -> torch.Tensor:
    """The eigenvectors of the ``rank`` largest eigenvalues, largest first, as columns of fixed sign; float64."""
    vectors = torch.linalg.eigh(symmetric).eigenvectors
    return with_fixed_signs(vectors[:, -rank:].flip(1))


def with_fixed_signs(p: torch.Tensor) -> torch.Tensor:
    """Columns with their largest entry positive.

    Vectors are defined up to their signs, and Adam's averages outlive a refresh: without a rule they would meet signs
    that depend on the library and on the number of processes.
    """
    largest = p.gather(0, p.abs().argmax(dim=0, keepdim=True))
    return torch.where(largest < 0, -p, p)


def randomised_right(
    times_gram: Callable[[torch.Tensor], torch.Tensor], num_columns: int, rank: int, generator: torch.Generator
) -> torch.Tensor:
    """V (n, r) by subspace iteration, float32 on the CPU or wherever ``times_gram`` answers.

    Args:
        times_gram: Z (n, q) -> G^T (G Z), which a sum over rows gives.
        generator: of the CPU; the same on every process.
    """
    width = min(rank + OVERSAMPLING, num_columns)
    z = torch.randn(num_columns, width, generator=generator)
    for _ in range(NUM_PASSES):
        z = times_gram(z)
        z, _ = torch.linalg.qr(z)
    inner = z.T.double() @ times_gram(z).double()
    return with_fixed_signs(z @ leading((inner + inner.T) / 2, rank).to(z.dtype))


def left_of(g_v: torch.Tensor) -> torch.Tensor:
    """U (m, r) from G V (m, r), whose columns are U's times singular values."""
    return with_fixed_signs(torch.linalg.qr(g_v)[0])


def adam_direction(
    reduced: torch.Tensor,
    average: torch.Tensor,
    squares: torch.Tensor,
    num_steps: torch.Tensor,
    skip: torch.Tensor,
    betas: tuple[float, float],
    eps: float,
) -> torch.Tensor:
    """Adam's direction N for R, and its averages moved on in place.

    Args:
        average: of R, same shape; ``squares``: of its squares.
        num_steps: scalar, steps made with these averages, this one included.
        skip: scalar, 1 where the averages must stay as they are (N is then of no use), else 0.
    """
    beta1, beta2 = betas
    moved = average * beta1 + reduced * (1 - beta1)
    squared = squares * beta2 + reduced.square() * (1 - beta2)
    average.copy_(torch.where(skip > 0, average, moved))
    squares.copy_(torch.where(skip > 0, squares, squared))
    corrected = (squares / (1 - beta2**num_steps)).sqrt_().add_(eps)
    return average / (1 - beta1**num_steps) / corrected
