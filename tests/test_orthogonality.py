"""The closed-form gradient of the regulariser against autograd, for all forms."""

import pytest
import torch

from adalora_dist.orthogonality import cosines, gradient_factor, regulariser


@pytest.mark.parametrize("form", ["norm", "squared", "directions"])
def test_closed_form_equals_autograd(form):
    generator = torch.Generator().manual_seed(0)
    shapes = [(17, 4), (9, 4), (5, 8), (64, 12)]  # (5, 8): wider than tall, as rank above the dimension
    xs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    regulariser(xs, form, gamma=0.3).backward()
    for x in xs:
        if form == "directions":  # each column's gradient is multiplied by its squared length
            x.grad *= x.detach().square().sum(dim=0)
        factor = gradient_factor(x.detach().T @ x.detach(), form, 0.3, num_matrices=len(xs))
        torch.testing.assert_close(x.detach() @ factor, x.grad, rtol=0, atol=1e-10)
        single = x.detach().float()
        factor = gradient_factor(single.T @ single, form, 0.3, num_matrices=len(xs))
        error = (single @ factor - x.grad.float()).norm() / x.grad.norm()
        assert error < 1e-6


@pytest.mark.parametrize("form", ["norm", "squared", "directions"])
def test_orthonormal_columns_have_no_gradient(form):
    x = torch.eye(6, 3)
    assert (x @ gradient_factor(x.T @ x, form, 0.5, 2)).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_turn_columns_and_leave_their_lengths(dtype):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x *= torch.tensor([1e-9, 1e-3, 0.1, 1, 10, 1e4], dtype=dtype)
    lengths = x.norm(dim=0)
    gradient = x @ gradient_factor(x.T @ x, "directions", gamma=0.5, num_matrices=1)
    along = (gradient * x).sum(dim=0) / lengths.square()
    assert along.abs().max() < 1e-5
    pushes = gradient.norm(dim=0) / lengths  # gamma times at most the sum of a column's cosines over |C|_F
    assert pushes.isfinite().all() and 0 < pushes.min() and pushes.max() <= 0.5 * 5**0.5
    before, after = (cosines(y.T @ y)[0].norm() for y in (x, x - 0.01 * gradient))
    assert after < before
    rescaled = x / lengths
    of_unit = rescaled @ gradient_factor(rescaled.T @ rescaled, "directions", gamma=0.5, num_matrices=1)
    torch.testing.assert_close(gradient / lengths, of_unit, rtol=1e-3, atol=1e-5)  # no size, only directions


def test_columns_of_zero_have_no_direction():
    gram = torch.zeros(2, 4, 4)
    assert torch.equal(gradient_factor(gram, "directions", 0.5, 2), gram)
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0
    gradient = x @ gradient_factor(x.T @ x, "directions", 0.5, 2)
    others = x[:, [0, 1, 3]]
    assert (gradient[:, 2] == 0).all()
    torch.testing.assert_close(
        gradient[:, [0, 1, 3]], others @ gradient_factor(others.T @ others, "directions", 0.5, 2)
    )
