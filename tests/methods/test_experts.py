"""Adapters of experts: against a loop over the experts, one by one, of the plain model."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
import transformers as tf

from adalora_dist import LoraConfig, adapt, attach
from adalora_dist.backbones.experts import grouped_product, place_of, stacks_of
from adalora_dist.config.methods import method_config
from adalora_dist.methods.adalora.orthogonality import regulariser
from adalora_dist.methods.adalora.routing import TokensSeen
from adalora_dist.methods.adalora.sums import TripletSums
from adalora_dist.sharding.layout import FlatBuffer, SpanLayout
from adalora_dist.sharding.spans import Factor, Span
from tests.support.expert_models import MIXTURES, SIZES, loss_of, mixture
from tests.support.expert_steps import expert_layers, looped_loss, moved
from tests.support.expert_training import FALLING, RANK, config, run
from tests.support.refusals import refusal


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_start_changes_nothing_and_gradients_are_those_of_a_loop_over_experts(kind):
    model = mixture(kind).double().eval()
    plain, before = copy.deepcopy(model), loss_of(model)
    layers = expert_layers(adapt(model, config(targets=("experts",))))
    assert len(layers) == 2 * len({stack.owner for stack in stacks_of(plain)}) > 0
    assert (loss_of(model) - before).abs() < 1e-12

    for layer in layers:  # torch's optimizers and engines keep adapters in float32; here in float64
        layer.double()
    model.adalora.double()
    moved(model, layers)
    loss_of(model).backward()
    factors = {
        layer.name: tuple(x.detach().clone().requires_grad_() for x in (layer.P, layer.lam, layer.Qt))
        for layer in layers
    }
    loss = looped_loss(plain, layers, factors)
    loss.backward()
    assert (loss_of(model) - loss).abs() < 1e-12
    of_lam = model.adalora.lam.grad
    for layer in layers:
        p, lam, qt = (x.grad for x in factors[layer.name])
        assert p.any() and qt.any()
        torch.testing.assert_close(layer.P.grad, p, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(layer.Qt.grad, qt, rtol=1e-6, atol=1e-12)
        own = of_lam[layer.first : layer.first + layer.rank]
        torch.testing.assert_close(own, lam, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("method", ["adalora", "lora"])
def test_all_linear_takes_experts_and_routers_stay(method):
    model = mixture("qwen2_moe")
    adapters = adapt(model, method_config(method, init_rank=2))
    names = [name for adapter in adapters for name in adapter.matrix_names()]
    assert len(adapters) == 2 * (4 + 3 + 2) and len(names) == 2 * (4 + 3 + 2 * 4)
    assert "model.layers.1.mlp.experts.3.gate_up_proj" in names and not any("gate." in name for name in names)


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        (("experts",), {"gate_up_proj", "down_proj"}),
        (("mlp.experts",), {"gate_up_proj", "down_proj"}),
        (("experts.down_proj",), {"down_proj"}),
        ((r".*\.0\.mlp\.experts\.gate_up_proj", "q_proj"), {"gate_up_proj", "q_proj"}),
        (("down_proj",), {"down_proj"}),  # that of the shared expert, too
    ],
)
def test_experts_by_name(targets, leaves):
    adapters = adapt(mixture("qwen2_moe"), config(targets=targets))
    assert {adapter.name.rpartition(".")[2] for adapter in adapters} == leaves
    assert len(adapters) == {"mlp.experts": 4, "experts": 4, "down_proj": 4, "experts.down_proj": 2}.get(targets[0], 3)


@pytest.mark.parametrize("method", ["dora", "adadora", "lora_fa", "vera", "dvora"])
def test_other_methods_leave_experts_or_refuse_them_by_name(method):
    line = refusal(adapt, mixture("mixtral"), method_config(method, init_rank=2, targets=("experts",)))
    assert "adalora and lora" in line and "experts" in line
    line = refusal(adapt, mixture("mixtral"), method_config(method, init_rank=2, targets=("experts.down_proj",)))
    assert "model.layers.0.mlp.experts.down_proj" in line
    assert len(adapt(mixture("mixtral"), method_config(method, init_rank=2))) == 8


def test_what_has_no_experts_and_what_spreads_them_is_refused():
    dense = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, intermediate_size=24))
    assert "has no experts" in refusal(adapt, dense, config(targets=("experts",)))
    model = mixture("mixtral")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    assert "expert parallelism" in refusal(adapt, model, config(targets=("experts",)))


def test_names_of_matrices():
    assert place_of("model.layers.0.mlp.experts.3.down_proj") == ("model.layers.0.mlp.experts.down_proj", 3)
    assert place_of("model.norm") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_grouped_product_is_a_loop(dtype):
    """With the kernel (16 columns) and without (3), and an expert without rows."""
    for width in (16, 3):
        x, maps = torch.randn(7, 8, dtype=dtype), torch.randn(4, 8, width, dtype=dtype, requires_grad=True)
        x.requires_grad_()
        y = grouped_product(x, maps, torch.tensor([3, 3, 6, 7], dtype=torch.int32))
        rows = [(0, 3, 0), (3, 6, 2), (6, 7, 3)]
        expected = torch.cat([x[a:b] @ maps[e] for a, b, e in rows])
        weight = torch.randn_like(y)
        found = torch.autograd.grad((y * weight).sum(), (x, maps))
        looped = torch.autograd.grad((expected * weight).sum(), (x, maps))
        tolerance = {"rtol": 0.05, "atol": 0.1} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close((y, *found), (expected, *looped), **tolerance)
        assert not found[1][1].any()


def test_the_budget_is_met_over_experts_and_the_rest_alike():
    adapters, hooks, _ = run(mixture("qwen2_moe"), config(**FALLING))
    pattern = hooks.rank_pattern()
    assert sum(pattern.values()) == hooks.method_step.schedule.target_budget == round(1.5 * 30)
    assert len(pattern) == 30
    ragged = [layer for layer in expert_layers(adapters) if len(set(layer.ranks)) > 1]
    assert ragged and all(layer.P.shape == (layer.d_out, sum(layer.ranks)) for layer in ragged)
    assert all(pattern[name] == rank for a in adapters for name, rank in zip(a.matrix_names(), a.ranks, strict=True))


def test_an_expert_without_tokens_has_gradients_of_zero():
    model = mixture("qwen3_moe")
    with torch.no_grad():  # expert 3 of the first layer is never chosen
        model.model.layers[0].mlp.gate.weight[3] = 0
        model.model.layers[0].mlp.gate.weight[:3] = torch.randn(1, 16).abs() * torch.tensor([[1.0], [2.0], [3.0]])
    adapters = expert_layers(adapt(model, config(targets=("experts",))))
    moved(model, adapters)
    hidden = torch.randn(6, 16)
    model.model.layers[0].mlp.experts(hidden, torch.tensor([[0, 1]] * 6), torch.full((6, 2), 0.5)).sum().backward()
    for layer in adapters[:2]:
        for gradient in (layer.P.grad, layer.Qt.grad):
            of_expert = gradient.view(len(gradient), 4, RANK).abs().sum((0, 2))
            assert (of_expert > 0).tolist() == [True, True, False, False]


def test_a_step_under_autocast_over_float32_stacks_of_sizes_that_no_kernel_takes():
    torch.manual_seed(0)
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES | {"hidden_size": 20, "intermediate_size": 22}))
    layers = expert_layers(adapt(model, config(targets=("experts",))))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert layers and all(layer.P.grad.isfinite().all() and layer.P.grad.dtype == torch.float32 for layer in layers)


def test_saved_numbers_are_r_for_each_routed_token_beside_its_input():
    """For a backward the branch keeps its input, as LoRA does, and r numbers; not the stack, nor its product."""
    model = mixture("mixtral")
    [layer, *_] = expert_layers(adapt(model, config(targets=("experts.down_proj",))))
    moved(model, [layer])
    experts, kept = model.model.layers[0].mlp.experts, {}

    def note(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    hidden = torch.randn(10, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        experts(hidden, torch.tensor([[0, 1]] * 10), torch.full((10, 2), 0.5)).sum()
    assert max(kept.values()) < experts.down_proj.numel()
    assert experts.gate_up_proj.data_ptr() not in kept and experts.down_proj.data_ptr() not in kept
    assert 20 * RANK in kept.values() or any(n % RANK == 0 for n in kept.values())


# -------------------------------------------------------------------------------------------------- sums over spans


@pytest.mark.parametrize("form", ["directions", "norm", "squared"])
@pytest.mark.parametrize("seed", range(4))
def test_the_regulariser_is_of_each_expert_alone_on_any_partition(form, seed):
    """Equal and ragged ranks side by side in one factor; rows cut between ranks."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    factors, first = [], 0
    for rows in ((6, 4), (6, 4), (5, 7)):
        blocks = [(2, 2, 2), (1, 3, 2), (3,)][draw(3)]
        for kind, d in zip(("P", "Qt"), rows, strict=True):
            factors.append(Factor(kind, d, sum(blocks), first, blocks))
        first += sum(blocks)
    factors.append(Factor("lam", 1, first, 0))
    values = [torch.randn(f.rows, f.rank, generator=generator, dtype=torch.float64) for f in factors]

    matrices = [part for f, x in zip(factors, values, strict=True) if f.orthogonal for part in x.split(f.widths, dim=1)]
    leaves = [m.detach().clone().requires_grad_() for m in matrices]
    regulariser(leaves, form, 0.3).backward()
    gradients, expected = iter(leaf.grad for leaf in leaves), []
    for f in factors[:-1]:
        expected.append(torch.cat([next(gradients) for _ in f.widths], dim=1))
    if form == "directions":  # of which only the part across the columns is taken
        expected = [g - x * ((g * x).sum(0) / x.square().sum(0)) for g, x in zip(expected, values, strict=False)]

    num_ranks = 1 + draw(3)
    spans_of_ranks = [[] for _ in range(num_ranks)]
    for f in factors:
        cuts = sorted([0, f.numel, *(draw(f.numel + 1) for _ in range(num_ranks - 1))])
        for spans, cut in zip(spans_of_ranks, pairwise(cuts), strict=True):
            spans.append(Span(*cut))
    sums, buffers = [], []
    for spans in spans_of_ranks:
        layout = SpanLayout(factors, spans)
        sums.append(TripletSums(layout, spans_of_ranks, dtype=torch.float64, num_matrices=len(matrices)))
        local = [x.flatten()[s.start : s.stop] for x, s in zip(values, spans, strict=True)]
        buffers.append(layout.collect(local, FlatBuffer(layout, dtype=torch.float64)))
        sums[-1].gram_partials(buffers[-1])
    total = sum(s.partials.clone() for s in sums)
    found = [torch.zeros(f.numel, dtype=torch.float64) for f in factors]
    for s, buffer, spans in zip(sums, buffers, spans_of_ranks, strict=True):
        s.partials.copy_(total)
        out = s.orthogonality_gradient(buffer, form, 0.3, FlatBuffer(s.layout, dtype=torch.float64))
        local = [f[span.start : span.stop] for f, span in zip(found, spans, strict=True)]
        pieces, views = s.layout.views(local, out, orthogonal=True)
        for piece, view in zip(pieces, views, strict=True):
            piece.copy_(view)
    for f, gradient, wanted in zip(factors, found, expected, strict=False):
        torch.testing.assert_close(gradient.view(f.rows, f.rank), wanted)


def test_scores_by_token_are_divided_by_the_share_of_tokens():
    model, by_token = mixture("qwen3_moe"), config(**FALLING, expert_scores="per_token", targets=("experts",))
    layers = expert_layers(adapt(model, by_token))
    seen = TokensSeen(layers, by_token)
    tokens = torch.tensor([1.0, 3.0, 0.0, 4.0], dtype=torch.float64)
    scores = seen.weigh(torch.ones(4 * 4 * RANK, dtype=torch.float64), [tokens] * 4)
    expected = (2 / tokens.clamp(min=2e-6)) ** 2
    torch.testing.assert_close(scores.view(4, 4, RANK)[0, :, 0], expected)
    assert seen.smoothed[:4] == pytest.approx((0.15 * tokens).tolist())
    loss_of(model)
    assert [int(counted.sum()) for counted in seen.partials()] == [2 * 12 * 2] * 4
    seen.clear()
    assert not any(counted.any() for counted in seen.partials())


def test_a_run_with_scores_by_token_meets_its_budget_and_goes_on_from_its_state():
    settings = config(**FALLING, expert_scores="per_token")
    _, hooks, _ = run(mixture("mixtral"), settings)
    assert sum(hooks.rank_pattern().values()) == 36
    state = hooks.state()
    assert len(state.numbers["tokens_seen"]) == 4 * 4 and all(n > 0 for n in state.numbers["tokens_seen"])


def test_scores_by_token_without_experts_are_refused():
    model = mixture("mixtral")
    adapters = config(targets=("q_proj",), expert_scores="per_token", target_rank=1)
    adapt(model, adapters)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    message = refusal(attach, model, optimizer, adapters, 20)
    assert message.startswith("expert_scores=per_token: no stack of experts") and "add experts to targets" in message


def test_lora_of_experts_has_no_budget():
    model = mixture("gpt_oss")
    adapters = adapt(model, LoraConfig(init_rank=2, targets=("experts",)))
    assert [len(a.matrix_names()) for a in adapters] == [4] * 4
    loss_of(model).backward()
    assert all(a.P.grad.any() for a in adapters)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_compiler_sees_one_graph(dtype):
    sizes = dict(hidden_size=32, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES | sizes)).to(dtype)
    model.config.use_cache = False
    moved(model, adapt(model, config(targets=("experts",), init_rank=8, target_rank=2)))
    ids = torch.arange(3, 19).view(1, -1)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
