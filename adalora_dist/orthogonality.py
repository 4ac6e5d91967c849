"""The orthogonality regulariser in closed form: R(P, Q) = |P^T P - I|_F^2 + |Q Q^T - I|_F^2 (eq. 4), and relatives.

P and Q^T are both tall matrices X of shape (d, r), so one function serves both. X^T X is a sum over rows, hence over
any partition of the rows; the gradient of a row needs that row and the (r, r) Gram matrix only.

``squared`` is eq. 4: gamma * sum over matrices of |M|_F^2, gradient 4 gamma X M, with M = X^T X - I.
``norm`` is what the authors' code computes, and what the published gammas were tuned with: gamma times the mean over
the 2n matrices of |M|_F, gradient 2 gamma / (2n) X M / |M|_F, which goes to 0 with M where |M|_F is below 1e-12.

``directions`` leaves lengths alone, as a start with P = 0 needs: gamma times the mean over the 2n matrices of |C|_F,
where C holds the cosines c_ij between columns and 0 on its diagonal. With n_i = |x_i| the gradient of column i is
2 gamma / (2n) / |C|_F * sum_j c_ij (x_j / (n_i n_j) - c_ij x_i / n_i^2): it turns the column and does not stretch it,
but the shorter the column, the harder. So it is multiplied by n_i^2, which leaves its direction: F_ji = c_ij n_i / n_j
and F_ii = -sum_j c_ij^2, times the same factor. A column's push is then proportional to its own length, 0 for a column
that is 0 (which no other column sees), and for columns of length 1 that of ``norm`` without what would stretch them.
"""

from __future__ import annotations

from typing import Literal

import torch

OrthogonalityForm = Literal["directions", "norm", "squared"]

_SMALLEST_SQUARE = 1e-30
"""Columns whose squared length is not above this, 1e-15 or shorter, count as 0: float32 has no cosine for them."""


def defect(gram: torch.Tensor) -> torch.Tensor:
    """M = X^T X - I for a batch of Gram matrices, (..., r, r)."""
    return gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def cosines(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """C, (..., r, r), the cosines between columns with 0 on the diagonal and for columns of 0; lengths (..., r)."""
    squares = gram.diagonal(dim1=-2, dim2=-1)
    is_zero = squares <= _SMALLEST_SQUARE
    inverse = squares.masked_fill(is_zero, 1.0).rsqrt().masked_fill(is_zero, 0.0)
    c = gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    return c - torch.diag_embed(c.diagonal(dim1=-2, dim2=-1)), squares.clamp(min=0).sqrt()


def gradient_factor(
    gram: torch.Tensor,
    form: OrthogonalityForm,
    gamma: float,
    num_matrices: int,
    active: torch.Tensor | None = None,
) -> torch.Tensor:
    """The (..., r, r) matrices F with dR/dX = X F (``directions``: columns times n_i^2), for a batch of Gram matrices.

    Args:
        gram: (..., r, r), X^T X.
        form: see the module's docstring.
        gamma: the coefficient.
        num_matrices: 2n, how many X the mean of the forms ``directions`` and ``norm`` runs over.
        active: (..., r) bool, the columns of X that R is about; default: all.
    """
    m, lengths = cosines(gram) if form == "directions" else (defect(gram), None)
    if active is not None:
        m = m * (active.unsqueeze(-1) & active.unsqueeze(-2))
    if form == "squared":
        return 4 * gamma * m
    norm = torch.linalg.matrix_norm(m, keepdim=True).clamp_(min=1e-12)
    if lengths is not None:
        # n_i / n_j meets c_ij = 0 where n_j counts as 0.
        ratios = lengths.unsqueeze(-2) / lengths.unsqueeze(-1).clamp(min=_SMALLEST_SQUARE**0.5)
        m = m * ratios - torch.diag_embed(m.square().sum(dim=-2))
    return m.div_(norm).mul_(2 * gamma / num_matrices)


def regulariser(matrices: list[torch.Tensor], form: OrthogonalityForm, gamma: float) -> torch.Tensor:
    """gamma R over ``matrices``, each X of shape (d, r). For reports and as the reference of the closed form."""
    defects = [cosines(x.T @ x)[0] if form == "directions" else defect(x.T @ x) for x in matrices]
    if form == "squared":
        return gamma * torch.stack([m.square().sum() for m in defects]).sum()
    return gamma * torch.stack([torch.linalg.matrix_norm(m) for m in defects]).mean()
