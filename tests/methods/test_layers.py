"""SVDLinear against the formula, over several base modules; injection, and what it refuses by name."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.layers import Lambdas, SVDLinear
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.protocol import adapters_of
from tests.support.models import Net, config


def formula(layer: SVDLinear, x: torch.Tensor) -> torch.Tensor:
    return layer.base(x) + layer.scale * (x @ layer.Qt) @ torch.diag(layer.lam) @ layer.P.T


def filled(base, d_in, d_out, rank=3) -> SVDLinear:
    layer = SVDLinear(base, d_in, d_out, rank, scale=0.7)
    layer.reset(torch.Generator().manual_seed(0))
    nn.init.normal_(Lambdas([layer]).lam)
    return layer


def factors_of(layer: SVDLinear) -> list[nn.Parameter]:
    return [layer.P, layer.lambdas.lam, layer.Qt]


@pytest.mark.parametrize("base", [nn.Linear(5, 8), nn.Linear(5, 8, bias=False), Conv1D(8, 5)])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_forward_and_gradients_equal_the_formula(base, shape):
    layer = filled(base, 5, 8)
    base.requires_grad_(False)
    gradients = []
    for forward in (layer, lambda x: formula(layer, x)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = forward(x)
        y.sin().sum().backward()
        gradients.append([y.detach(), x.grad] + [p.grad.clone() for p in factors_of(layer)])
        for p in factors_of(layer):
            p.grad = None
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_new_layer_is_its_base_and_rank_zero_has_no_branch():
    base = nn.Linear(5, 8)
    layer = SVDLinear(base, 5, 8, 3, 1.0)
    layer.reset(torch.Generator().manual_seed(0))
    empty = SVDLinear(base, 5, 8, 0, 1.0)
    Lambdas([layer, empty])
    x = torch.randn(4, 5)
    assert torch.equal(layer(x), base(x))
    assert [n for n, _ in empty.named_parameters()] == ["base.weight", "base.bias"]
    assert torch.equal(empty(x), base(x))


def test_branch_computes_in_the_type_of_the_bases_output():
    layer = filled(nn.Linear(5, 8).bfloat16(), 5, 8)
    x = torch.randn(4, 5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    layer = filled(nn.Linear(5, 8), 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), formula(layer, x), rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert layer.P.grad.dtype == torch.float32


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    torch._dynamo.reset()
    stack = nn.Sequential(filled(nn.Linear(5, 8), 5, 8), nn.Tanh(), filled(Conv1D(5, 8), 8, 5))
    lam = Lambdas([stack[0], stack[2]]).lam
    nn.init.normal_(lam)
    parameters = [*stack.parameters(), lam]
    x = torch.randn(2, 4, 5)
    compiled = torch.compile(stack, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for run in (compiled, stack):
        run(x).square().sum().backward()
        gradients = [p.grad.clone() for p in parameters]
        for p in parameters:
            p.grad = None
        if run is compiled:
            expected = gradients
    torch.testing.assert_close(gradients, expected)
    torch.testing.assert_close(compiled(x), stack(x))


def test_backward_keeps_no_more_than_loras():
    """Of what grows with the tokens: the input, which the base's backward keeps anyway, and one (tokens, r) tensor."""
    tokens, d_in, rank = 1000, 5, 3
    for trains_lambda in (True, False):
        layer = filled(nn.Linear(d_in, 8), d_in, 8, rank)
        layer.base.requires_grad_(False)
        layer.lambdas.lam.requires_grad_(trains_lambda)
        kept: list[torch.Tensor] = []
        x = torch.randn(tokens, d_in, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            layer(x)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        assert sum(size for size in storages.values() if size >= 4 * tokens) == 4 * tokens * (d_in + rank)


def test_injection_freezes_the_rest_and_is_the_same_every_time():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        model = Net()
        matrices = adapt(model, config(train_modules=("head",)), seed=5)
        models.append(model)
    assert [m.name for m in matrices] == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert adapters_of(model) == matrices
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{m.name}.{k}" for m in matrices for k in ("P", "Qt")} | {
        "head.weight",
        "head.bias",
        "adalora.lam",
    }
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in models), strict=True):
        assert torch.equal(a, b), name


def test_orthonormal_init_has_unit_columns_on_average():
    model = nn.Sequential(nn.Linear(400, 300))
    [matrix] = adapt(model, config(targets=("0",), init_rank=20, target_rank=2, start="paper", init="orthonormal"))
    for x in (matrix.P, matrix.Qt):
        assert abs(x.square().sum(0).mean() - 1) < 0.1
    [matrix] = adapt(
        nn.Sequential(nn.Linear(400, 300)), config(targets=("0",), init_rank=20, start="paper", init="gaussian")
    )
    assert abs(matrix.P.std() - 0.02) < 0.002


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )  # fmt: skip
    )


def test_all_linear_is_every_matrix_of_the_backbone_but_not_the_head():
    names = [m.name for m in adapt(tiny_llama(), config(targets=("all-linear",)))]
    assert len(names) == 14 and not any("lm_head" in n for n in names)


def test_selection_by_name_and_regular_expression():
    assert len(adapt(tiny_llama(), config(targets=("q_proj", "v_proj")))) == 4
    assert len(adapt(tiny_llama(), config(targets=(r"model\.layers\.1\..*_proj",)))) == 7
    assert len(adapt(tiny_llama(), config(targets=("model.layers.0.mlp.up_proj",)))) == 1


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.c = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.c.weight


@pytest.mark.parametrize(
    ("model", "targets", "said"),
    [
        (Net(), ("q_proj",), "'q_proj' matches no module of Net; its linear modules are named down, head, up"),
        (Net(), ("blocks",), "blocks is a ModuleList, not a linear map"),
        (Shared(), ("a",), "b and a are one shared module"),
        (Shared(), ("c",), "weight of .* is tied"),
        (nn.Sequential(nn.ReLU()), ("all-linear",), "has no linear maps"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(model, targets, said):
    with pytest.raises(UserError, match=said):
        adapt(model, config(targets=targets))


def test_a_second_injection_is_refused():
    model = Net()
    adapt(model, config())
    with pytest.raises(UserError, match="already has adapters"):
        adapt(model, config())
