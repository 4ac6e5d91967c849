"""One vector of lambdas, and all P diag(lambda) from one operation: against each layer's own product."""

import copy

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.weak import TensorWeakRef

from adalora_dist.methods.adalora import layers
from adalora_dist.methods.adalora.layers import Lambdas
from adalora_dist.methods.adalora.products import lambda_gradients, times_lambdas
from adalora_dist.methods.inject import adapt
from tests.support.models import Net, adapted_net, config
from tests.support.ranks import run_ranks


def net(**changes) -> Net:
    """Adapters that do something."""
    model = adapted_net(config(**changes))
    with torch.no_grad():
        model.adalora.lam.normal_(generator=torch.Generator().manual_seed(2))
    return model


def gradients_of(model: Net, run=None) -> list[torch.Tensor]:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    model.zero_grad()
    (run or model)(x).square().sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.fixture
def apart(monkeypatch):
    """Gradients of a model whose layers all multiply their own P by their part of lambda."""

    def gradients(model: Net, run=None) -> list[torch.Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(Lambdas, "weight", lambda self, layer: layer.P * self._own(layer))
            return gradients_of(model, run)

    return gradients


def assert_equal(ours, expected):
    assert len(ours) == len(expected) == 9 and expected[-1].abs().min() > 0
    torch.testing.assert_close(ours, expected)


def test_gradient_of_lambda_over_sizes_and_ranks():
    sizes = [(5, 2), (7, 3), (5, 4), (7, 1)]
    pairs = [(torch.randn(s), torch.randn(s)) for s in sizes]
    for (p, g), made in zip(pairs, lambda_gradients(*map(list, zip(*pairs, strict=True))), strict=True):
        torch.testing.assert_close(made, (p * g).sum(0))


def test_products_and_gradients_are_each_layers_own(apart):
    model = net()
    assert_equal(gradients_of(model), apart(model))
    x = torch.randn(5, 7)
    assert torch.equal(model(x).detach(), torch.no_grad()(model)(x))


def test_a_layer_that_takes_no_part_gets_no_gradient(apart):
    model = net()
    model.blocks[1].skip = True
    ours = gradients_of(model)
    assert model.blocks[1].up.P.grad is None and (model.adalora.lam.grad[6:] == 0).all()
    expected = apart(model)
    torch.testing.assert_close(ours, expected)
    assert expected[-1][:6].abs().min() > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_with_activation_checkpoints(apart, use_reentrant):
    model = net()

    def run(x):
        x = x.clone().requires_grad_()  # without it, a reentrant checkpoint has no gradient
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return model.head(x)

    assert_equal(gradients_of(model, run), apart(model))


def run_of(model: Net, is_checkpointed: bool):
    def run(x):
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=False) if is_checkpointed else block(x)
        return model.head(x)

    return run


def backward_of_two(run, together: bool) -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    losses = [run(x).square().sum() for _ in range(2)]
    for loss in [sum(losses)] if together else losses:
        loss.backward()


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_two_forwards_before_their_backwards(apart, is_checkpointed, together):
    """Together or one after the other."""
    model = net()
    expected = [2 * g for g in apart(model)]
    model.zero_grad()
    backward_of_two(run_of(model, is_checkpointed), together)
    assert_equal([p.grad for p in model.parameters() if p.requires_grad], expected)


def sharded_gradients(rank: int, world_size: int) -> dict[str, list[torch.Tensor]]:
    """Of the same forwards on both ranks, so that the mean over them is that of one process."""
    found = {}
    for is_checkpointed in (False, True):
        for kind in ("one", "together", "one after the other"):
            model = net()
            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
            model.forward = run_of(model, is_checkpointed)  # the root's hooks gather lambda
            if kind == "one":
                gradients_of(model)
            else:
                backward_of_two(model, kind == "together")
            scale = 1 if kind == "one" else 2
            gradients = [p.grad.full_tensor() / scale for p in model.parameters() if p.requires_grad]
            found[f"{kind}, checkpointed: {is_checkpointed}"] = gradients
    return found


def test_products_of_what_fsdp2_has_gathered(apart):
    expected = apart(net())
    found = run_ranks(2, sharded_gradients)[0]
    assert len(found) == 6
    for gradients in found.values():
        assert_equal(gradients, expected)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_products_go_with_the_layers_that_backward_has_passed(monkeypatch, is_checkpointed):
    """When the first layer's gradients are made, the last one's product is in memory no more."""
    made = []

    def multiply(lams, ps):
        products = times_lambdas(lams, ps)
        made.extend(map(TensorWeakRef, products))
        return products

    monkeypatch.setattr(layers, "times_lambdas", multiply)
    model = net()
    loss = run_of(model, is_checkpointed)(torch.randn(5, 7).requires_grad_()).sum()
    assert [product() is None for product in made] == [is_checkpointed] * 4
    left = []
    model.blocks[0].up.Qt.register_hook(lambda _: left.append([product() is None for product in made]))
    loss.backward()
    assert left[0][2:4] == [True, True] and len(made) == (8 if is_checkpointed else 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_is_used_again(apart, dtype):
    """As in ALBERT, where all blocks are one; in bfloat16 nothing has kept its float32 product."""
    model = net()
    for block in model.blocks:
        block.up.base.to(dtype), block.down.base.to(dtype)
    model.blocks[1] = model.blocks[0]

    def run(x):
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            return model(x).float()

    ours, expected = gradients_of(model, run), apart(model, run)
    assert len(ours) == len(expected) == 5 and expected[0].abs().max() > 0
    torch.testing.assert_close(ours, expected, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-3)


def test_a_forward_sees_what_has_changed_since_the_last():
    """Also where that one had no backward."""
    model = net()
    x = torch.randn(5, 7)
    for parameter in (model.blocks[0].up.P, model.blocks[1].down.P, model.adalora.lam):
        before = model(x)
        with torch.no_grad():
            parameter.mul_(1.5)
        after = model(x)
        assert not torch.equal(before, after) and torch.equal(after.detach(), torch.no_grad()(model)(x))


def test_a_change_before_the_backward_is_an_error():
    model = net()
    loss = model(torch.randn(5, 7)).sum()
    with torch.no_grad():
        model.blocks[0].up.P.mul_(2)
    with pytest.raises(RuntimeError, match="changed between a forward and its backward"):
        loss.backward()


def test_a_p_that_was_given_up_before_the_backward_is_an_error():
    """Not a crash of the process, as reading it would be."""
    made = times_lambdas([torch.ones(2)], [p := torch.ones(3, 2, requires_grad=True)])[0]
    p.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="given up before its backward"):
        made.sum().backward()


def test_a_part_of_the_model_alone():
    """As an encoder that is called by itself; what was made for it serves the rest."""
    model = net()
    x = torch.randn(5, 7)
    gradients = []
    for run in (model, lambda x: model.head(model.blocks[1](model.blocks[0](x)))):
        model.zero_grad()
        run(x).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)


def test_a_copy_is_a_model_of_its_own():
    model = net()
    model(torch.randn(5, 7))  # between a forward and its backward
    other = copy.deepcopy(model)
    assert all(m.lambdas is other.adalora for m in other.modules() if hasattr(m, "Qt"))
    with torch.no_grad():
        other.adalora.lam.zero_()
    x = torch.randn(5, 7)
    assert not torch.equal(model(x), other(x)) and model.adalora.lam.all()
    assert set(model.state_dict()) == set(other.state_dict())
    assert sum(name.endswith("lam") for name in model.state_dict()) == 1


def test_a_scale_per_matrix_and_a_matrix_without_triplets():
    from adalora_dist.methods.adalora.layers import SVDLinear

    layers = [SVDLinear(torch.nn.Linear(7, 7), 7, 7, rank, scale) for rank, scale in ((2, 0.5), (0, 1.0), (3, 2.0))]
    lambdas = Lambdas(layers)
    with torch.no_grad():
        lambdas.lam.copy_(torch.arange(1.0, 6.0))
        for layer in (layers[0], layers[2]):
            layer.reset(torch.Generator().manual_seed(0))
    expected = torch.randn(4, 7)
    found = expected
    for layer in layers:
        found = layer(found)
        expected = layer.base(expected) + (
            layer.scale * expected @ layer.Qt * layer.lam @ layer.P.T if layer.rank else 0
        )
    torch.testing.assert_close(found, expected)
    assert layers[2].lam.tolist() == [3, 4, 5] and lambdas.element_name("lam", 2) == f"{layers[2].name}.lam"


def test_a_model_with_an_attribute_of_that_name_is_refused():
    from adalora_dist.io.errors import UserError

    model = Net()
    model.adalora = 1
    with pytest.raises(UserError, match="has an attribute 'adalora' already"):
        adapt(model, config())
