"""The orthogonality regulariser R(P, Q) = |P^T P - I|_F^2 + |Q Q^T - I|_F^2 in closed form (eq. 4).

P and Q^T are both tall matrices X of shape (d, r), so one function serves both. X^T X is a sum over rows, hence over
any partition of the rows; the gradient of a row needs that row and the (r, r) Gram matrix only.

``squared`` is eq. 4: gamma * sum over matrices of |M|_F^2, gradient 4 gamma X M, with M = X^T X - I.
``norm`` is what the authors' code computes, and what the published gammas were tuned with: gamma times the mean over
the 2n matrices of |M|_F, gradient 2 gamma / (2n) X M / |M|_F, which goes to 0 with M where |M|_F is below 1e-12.
"""

from __future__ import annotations

from typing import Literal

import torch

OrthogonalityForm = Literal["norm", "squared"]


def defect(gram: torch.Tensor) -> torch.Tensor:
    """M = X^T X - I for a batch of Gram matrices, (..., r, r)."""
    return gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def gradient_factor(
    gram: torch.Tensor,
    form: OrthogonalityForm,
    gamma: float,
    num_matrices: int,
    active: torch.Tensor | None = None,
) -> torch.Tensor:
    """The (..., r, r) matrices F with dR/dX = X F, for a batch of Gram matrices.

    Args:
        gram: (..., r, r), X^T X.
        form: see the module's docstring.
        gamma: the coefficient.
        num_matrices: 2n, how many X the mean of the ``norm`` form runs over.
        active: (..., r) bool, the columns of X that R is about; default: all.
    """
    m = defect(gram)
    if active is not None:
        m = m * (active.unsqueeze(-1) & active.unsqueeze(-2))
    if form == "squared":
        return 4 * gamma * m
    norm = torch.linalg.matrix_norm(m, keepdim=True).clamp_(min=1e-12)
    return m.div_(norm).mul_(2 * gamma / num_matrices)


def regulariser(matrices: list[torch.Tensor], form: OrthogonalityForm, gamma: float) -> torch.Tensor:
    """gamma R over ``matrices``, each X of shape (d, r). For reports and as the reference of the closed form."""
    defects = [defect(x.T @ x) for x in matrices]
    if form == "squared":
        return gamma * torch.stack([m.square().sum() for m in defects]).sum()
    return gamma * torch.stack([torch.linalg.matrix_norm(m) for m in defects]).mean()
