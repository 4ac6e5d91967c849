"""The closed-form gradient of the regulariser against autograd, for both forms."""

import pytest
import torch

from adalora_dist.methods.adalora.orthogonality import gradient_factor, regulariser


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_closed_form_equals_autograd(form):
    generator = torch.Generator().manual_seed(0)
    shapes = [(17, 4), (9, 4), (5, 8), (64, 12)]  # (5, 8): wider than tall, as rank above the dimension
    xs = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    regulariser(xs, form, gamma=0.3).backward()
    for x in xs:
        factor = gradient_factor(x.detach().T @ x.detach(), form, 0.3, num_matrices=len(xs))
        torch.testing.assert_close(x.detach() @ factor, x.grad, rtol=0, atol=1e-10)
        single = x.detach().float()
        factor = gradient_factor(single.T @ single, form, 0.3, num_matrices=len(xs))
        error = (single @ factor - x.grad.float()).norm() / x.grad.norm()
        assert error < 1e-6


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_orthonormal_columns_have_no_gradient(form):
    x = torch.eye(6, 3)
    assert (x @ gradient_factor(x.T @ x, form, 0.5, 2)).abs().max() == 0
