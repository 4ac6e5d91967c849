"""The closed-form gradient of the regulariser against autograd, for all forms."""

import pytest
import torch

from adalora_dist.methods.adalora.orthogonality import gradient_factor, regulariser


@pytest.mark.parametrize("form", ["norm", "squared", "directions"])
def test_closed_form_equals_autograd(form):
    generator = torch.Generator().manual_seed(0)
    shapes = [(17, 4), (9, 4), (5, 8), (64, 12)]  # (5, 8): wider than tall, as rank above the dimension
    xs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    regulariser(xs, form, gamma=0.3).backward()
    for x in xs:
        if form == "directions":  # less the part of each column's gradient along the column
            value = x.detach()
            x.grad -= value * (value * x.grad).sum(dim=0) / value.square().sum(dim=0)
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
    x *= torch.tensor([1e-9, 1e-3, 0.1, 1, 2, 3], dtype=dtype)
    lengths = x.norm(dim=0)
    gradient = x @ gradient_factor(x.T @ x, "directions", gamma=0.5, num_matrices=1)
    along = (gradient * x).sum(dim=0) / (lengths * gradient.norm(dim=0))
    assert gradient.isfinite().all() and (gradient.norm(dim=0) > 0).all() and along.abs().max() < 1e-4

    def size(y: torch.Tensor) -> torch.Tensor:
        return regulariser([y], "directions", 0.5)

    assert size(x - 1e-4 * gradient) < size(x)
    assert (gradient.norm(dim=0) / lengths)[0] < 0.5 * 2 * lengths.square().sum()  # a tiny column's push is tiny


@pytest.mark.parametrize("form", ["directions", "norm", "squared"])
def test_a_matrix_of_zeros_has_no_gradient(form):
    x = torch.zeros(9, 4)
    gradient = x @ gradient_factor(x.T @ x, form, 0.5, 2)
    assert torch.equal(gradient, x)


def test_columns_of_zero_have_no_direction_and_move_no_other():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0
    gradient = x @ gradient_factor(x.T @ x, "directions", 0.5, 2)
    others = x[:, [0, 1, 3]]
    assert (gradient[:, 2] == 0).all()
    expected = others @ gradient_factor(others.T @ others, "directions", 0.5, 2)
    torch.testing.assert_close(gradient[:, [0, 1, 3]], expected)


@pytest.mark.parametrize("form", ["directions", "norm", "squared"])
def test_inactive_columns_take_no_part(form):
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    active = torch.tensor([True, True, False, True])
    out = torch.empty(4, 4)
    assert gradient_factor(x.T @ x, form, 0.5, 2, active, out=out) is out
    others = x[:, active]
    torch.testing.assert_close((x @ out)[:, active], others @ gradient_factor(others.T @ others, form, 0.5, 2))
    assert ((x @ out)[:, ~active] == 0).all()
