"""Importance averages against the recurrence written out, and exact selection under ties, zeros and infinities."""

import shutil

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from adalora_dist.methods.adalora.importance import local_budgets, select, select_local, update_averages
from tests.support.ranks import run_ranks

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def test_averages_follow_the_recurrence():
    generator = torch.Generator().manual_seed(0)
    sensitivity, uncertainty = torch.zeros(50), torch.zeros(50)
    expected_s, expected_u = torch.zeros(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    for _ in range(20):
        w, g = torch.randn(2, 50, generator=generator)
        update_averages(sensitivity, uncertainty, w * g, beta1=0.85, beta2=0.7)
        instant = (w.double() * g.double()).abs()
        expected_s = 0.85 * expected_s + 0.15 * instant
        expected_u = 0.7 * expected_u + 0.3 * (instant - expected_s).abs()
    torch.testing.assert_close(sensitivity.double(), expected_s, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(uncertainty.double(), expected_u, rtol=1e-5, atol=1e-8)


def compiled_and_not(rank: int, world_size: int) -> list[list[torch.Tensor]]:
    """Averages of the compiled kernel, of the reference, and the compiled kernel's after a step that it was to skip."""
    generator = torch.Generator().manual_seed(0)
    averages = [[torch.zeros(1001), torch.zeros(1001)] for _ in range(2)]
    for beta2 in (0.85, 0.7):
        w, g = torch.randn(2, 1001, generator=generator)
        for (sensitivity, uncertainty), compiled in zip(averages, (True, False), strict=True):
            update_averages(sensitivity, uncertainty, w * g, 0.85, beta2, torch.zeros(()), compiled)
    skipped = [x.clone() for x in averages[0]]
    g[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    update_averages(*skipped, w * g, 0.85, 0.85, torch.ones(()), compiled=True)
    return [*averages, skipped]


@needs_compiler
def test_the_compiled_kernel_is_the_reference():
    """And where it is to skip, it leaves the averages as they are bit for bit, whatever the gradients."""
    [(compiled, reference, skipped)] = run_ranks(1, compiled_and_not)
    torch.testing.assert_close(compiled, reference, rtol=1e-6, atol=1e-9)
    assert all(map(torch.equal, compiled, skipped)) and compiled[1].min() > 0


def test_select_breaks_ties_in_canonical_order():
    assert select(torch.zeros(6), 2).keep.tolist() == [True, True, False, False, False, False]
    assert select(torch.ones(4), 3).keep.tolist() == [True, True, True, False]
    scores = torch.tensor([1.0, torch.inf, 2.0, torch.nan, torch.inf, 2.0, -torch.inf])
    assert select(scores, 3).keep.tolist() == [False, True, True, False, True, False, False]
    assert select(scores, 3).lowest_score == 2 and select(scores, 0).lowest_score == torch.inf
    assert select(scores, 0).keep.sum() == 0 and select(scores, 7).keep.all()


values = st.sampled_from([0.0, 1.0, 2.0, float("inf"), float("nan"), 1e-300, 1e300])


@given(scores=st.lists(values, min_size=1, max_size=60), data=st.data())
def test_select_keeps_exactly_the_budget_and_the_best(scores, data):
    budget = data.draw(st.integers(0, len(scores)))
    tensor = torch.tensor(scores, dtype=torch.float64)
    keep, lowest = select(tensor, budget)
    assert int(keep.sum()) == budget
    clean = torch.where(tensor.isnan(), -torch.inf, tensor)
    assert lowest == (clean[keep].min() if budget else torch.inf)
    if 0 < budget < len(scores):
        assert clean[keep].min() >= clean[~keep].max()


@given(ranks=st.lists(st.integers(0, 9), min_size=1, max_size=12), data=st.data())
def test_local_shares_add_up(ranks, data):
    assume(sum(ranks) > 0)
    budget = data.draw(st.integers(0, sum(ranks)))
    shares = local_budgets(ranks, budget)
    assert sum(shares) == budget and all(0 <= s <= r for s, r in zip(shares, ranks, strict=True))
    scores = torch.rand(sum(ranks)) + 1
    keep, lowest = select_local(scores, ranks, budget)
    assert lowest == (scores[keep].min() if keep.any() else torch.inf)
    assert [int(part.sum()) for part in keep.split(ranks)] == shares


def test_local_shares_are_equal_where_they_can_be():
    assert local_budgets([4, 4, 4], 7) == [3, 2, 2]
    assert local_budgets([1, 4, 4], 7) == [1, 3, 3]
