"""Experts after compaction: the masked run, bit for bit as far as products have the same bits at every width."""

from __future__ import annotations

import pytest
import torch

from adalora_dist.backbones import experts
from adalora_dist.methods.adalora.layers import Lambdas
from adalora_dist.methods.adalora.widening import Ragged, Widening
from tests.support.expert_models import MIXTURES, loss_of, mixture
from tests.support.expert_steps import expert_layers
from tests.support.expert_training import FALLING, config, run
from tests.support.fixed_order import FixedOrder

ALWAYS = ("gpt_oss", "llama4")


def test_compaction_changes_nothing_but_memory():
    runs = [run(mixture("mixtral").double(), config(**FALLING, compact=compact)) for compact in (True, False)]
    (small, hooks, losses), (whole, masked, expected) = runs
    assert hooks.rank_pattern() == masked.rank_pattern()
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    assert sum(a.rank for a in small) == 36 and sum(a.rank for a in whole) == 72


@pytest.mark.parametrize("kind", [k if k in ALWAYS else pytest.param(k, marks=pytest.mark.slow) for k in MIXTURES])
def test_with_sums_in_one_order_compaction_is_bit_for_bit(kind, monkeypatch):
    """Nothing of ours sums in another order afterwards: what is left is the library's choice of kernels."""
    monkeypatch.setattr(experts, "_has_kernel", lambda *_: False)
    with FixedOrder():
        runs = [run(mixture(kind), config(**FALLING, compact=compact)) for compact in (True, False)]
    (_, hooks, losses), (_, masked, expected) = runs
    assert losses == expected and hooks.rank_pattern() == masked.rank_pattern()
    kept = {update.name: update for update in masked.updates()}
    for update in hooks.updates():
        assert torch.equal(update.delta(), kept[update.name].delta())


def test_factors_are_made_equally_wide_together_and_gradients_come_from_their_places():
    sizes = [(4, (1, 3), 4, True), (5, (2, 2, 0), 2, False), (4, (2, 1), 3, False), (5, (1, 1), 4, False)]
    ragged = [Ragged(*size) for size in sizes]
    factors = [torch.randn(r.rows, sum(r.widths), requires_grad=True) for r in ragged]
    wide = Widening(ragged)(factors)
    (sum((k + 1) * (x * x).sum() for k, x in enumerate(wide) if k != 3)).backward()
    assert factors[3].grad is None  # it had no part
    for k, (r, factor, made) in enumerate(zip(ragged, factors, wide, strict=True)):
        matrices = made.view(r.rows, len(r.widths), r.width).unbind(1)
        for own, of_matrix in zip(factor.split(r.widths, dim=1), matrices, strict=True):
            assert torch.equal(of_matrix[:, : own.shape[1]], own) and made.isfinite().all()
            assert not (r.fill and of_matrix[:, own.shape[1] :].any())
        if k != 3:
            torch.testing.assert_close(factor.grad, 2 * (k + 1) * factor.detach())


def test_stacks_together_learn_as_each_by_itself_and_see_what_is_edited(monkeypatch):
    model = mixture("mixtral")
    layers = expert_layers(run(model, config(**FALLING, targets=("experts",))).adapters)
    assert any(len(set(layer.ranks)) > 1 for layer in layers)

    def gradients():
        model.zero_grad()
        loss_of(model).backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    def apart():
        with monkeypatch.context() as patch:
            patch.setattr(Lambdas, "weight", lambda self, layer: layer.P * self._own(layer))
            return gradients()

    torch.testing.assert_close(gradients(), apart(), rtol=1e-5, atol=1e-7)
    first = loss_of(model)
    with torch.no_grad():
        layers[0].Qt.mul_(2)
    edited = loss_of(model)
    with torch.no_grad():
        assert edited != first and (edited - loss_of(model)).abs() < 1e-6
    model.adalora.release()
    (loss_of(model) + loss_of(model)).backward()  # two forwards of one product


def test_a_column_may_have_other_bits_if_it_stands_alone():
    """Why no run can promise more: of one product, the library itself does not give a column the same bits always."""
    generator = torch.Generator().manual_seed(0)
    differing = 0
    for d in (8, 16, 64, 416):
        x, q = torch.randn(24, d, generator=generator), torch.randn(d, 16, generator=generator)
        for dtype in (torch.float32, torch.float64):
            whole = x.to(dtype) @ q.to(dtype)
            for width in range(1, 16):
                alone = x.to(dtype) @ q[:, :width].to(dtype)
                torch.testing.assert_close(alone, whole[:, :width], rtol=1e-4, atol=1e-5)
                differing += not torch.equal(alone, whole[:, :width])
            with FixedOrder():
                assert torch.equal(x @ q[:, :3], (x @ q)[:, :3])
    if not differing:
        pytest.skip("this machine's products have the same bits at every width")
