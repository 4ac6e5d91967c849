"""The orthogonality regulariser in closed form: R(P, Q) = |P^T P - I|_F^2 + |Q Q^T - I|_F^2 (eq. 4), and relatives.

P and Q^T are both tall matrices X of shape (d, r), so one function serves both. X^T X is a sum over rows, hence over
any partition of the rows; the gradient of a row needs that row and the (r, r) Gram matrix only.

``squared`` is eq. 4: gamma * sum over matrices of |M|_F^2, gradient 4 gamma X M, with M = X^T X - I.
``norm`` is what the authors' code computes, and what the published gammas were tuned with: gamma times the mean over
the 2n matrices of |M|_F, gradient 2 gamma / (2n) X M / |M|_F, which goes to 0 with M where |M|_F is below 1e-12.

``directions`` leaves lengths alone, as a start with P = 0 needs. With O = X^T X less its diagonal, R is gamma times the
mean over the 2n matrices of |O|_F^2 / 2, whose gradient 2 gamma / (2n) X O pushes column i by sum_j (x_i.x_j) x_j: it
turns the column and shortens it. The part along the column is taken out, F_ii = -sum_j O_ij^2 / |x_i|^2. What is left,
sum_j |x_i| |x_j|^2 c_ij (x_j/|x_j| - c_ij x_i/|x_i|) with the cosines c_ij, only turns, and pairs count by their size:
a column that has hardly left 0 is not moved and moves no other, one that is 0 has no gradient. Where columns are almost
orthogonal, as those of a new Q, it is almost 0; the gradient of a norm would not be, and would turn Q at random until
P has left 0 and the task's gradient of Q with it.
"""

from __future__ import annotations

from typing import Literal

import torch

OrthogonalityForm = Literal["directions", "norm", "squared"]

_SMALLEST_SQUARE = 1e-30
"""A squared length of a column below this, which float32 can hardly hold, is 0."""


def defect(gram: torch.Tensor) -> torch.Tensor:
    """M = X^T X - I for a batch of Gram matrices, (..., r, r)."""
    return gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def gradient_factor(
    gram: torch.Tensor,
    form: OrthogonalityForm,
    gamma: float,
    num_matrices: int,
    active: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The (..., r, r) matrices F with dR/dX = X F, for a batch of Gram matrices (``directions``: what only turns).

    Args:
        gram: (..., r, r), X^T X.
        form: see the module's docstring.
        gamma: the coefficient.
        num_matrices: 2n, how many X the mean of the forms ``directions`` and ``norm`` runs over.
        active: (..., r) bool, the columns of X that R is about; default: all.
        out: where F is written; not ``gram`` itself.
    """
    pairs = None if active is None else active.unsqueeze(-1) & active.unsqueeze(-2)
    if form == "directions":
        share = 2 * gamma / num_matrices
        f = torch.mul(gram if pairs is None else gram * pairs, share, out=out)
        squares = gram.diagonal(dim1=-2, dim2=-1).clamp(min=_SMALLEST_SQUARE)
        # share * (|x_i|^2 - sum_j G_ij^2 / |x_i|^2), in which the terms of j = i cancel.
        f.diagonal(dim1=-2, dim2=-1).addcdiv_(f.square().sum(dim=-2), squares, value=-1 / share)
        return f
    m = defect(gram)
    if pairs is not None:
        m = m * pairs
    if form == "squared":
        return torch.mul(m, 4 * gamma, out=out)
    norm = torch.linalg.matrix_norm(m, keepdim=True).clamp_(min=1e-12)
    return torch.mul(m.div_(norm), 2 * gamma / num_matrices, out=out)


def regulariser(matrices: list[torch.Tensor], form: OrthogonalityForm, gamma: float) -> torch.Tensor:
    """gamma R over ``matrices``, each X of shape (d, r). For reports and as the reference of the closed form."""
    grams = [x.T @ x for x in matrices]
    if form == "directions":
        off = [gram - torch.diag(gram.diagonal()) for gram in grams]
        return gamma * torch.stack([o.square().sum() / 2 for o in off]).mean()
    defects = [defect(gram) for gram in grams]
    if form == "squared":
        return gamma * torch.stack([m.square().sum() for m in defects]).sum()
    return gamma * torch.stack([torch.linalg.matrix_norm(m) for m in defects]).mean()
