"""Experts after compaction: the masked run, bit for bit as far as products have the same bits at every width."""

from __future__ import annotations

import pytest
import torch

from adalora_dist.backbones import experts
from tests.support.expert_models import MIXTURES, mixture
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
