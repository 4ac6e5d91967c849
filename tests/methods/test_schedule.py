"""The budget schedule: closed forms at the ends, monotone between them, met exactly, refused when impossible."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.schedule import BudgetSchedule


def schedule(**changes) -> BudgetSchedule:
    values = dict(
        initial_budget=96, target_budget=32, total_steps=100, initial_warmup_steps=10, final_steps=30,
        mask_interval_steps=5,
    )  # fmt: skip
    return BudgetSchedule(**{**values, **changes})


def test_cubic_values():
    s = schedule()
    assert s.budget(0) == s.budget(10) == 96
    assert s.budget(40) == 32 + 64 // 8  # half way: (1/2)^3 of the way back up
    assert s.budget(70) == s.budget(99) == 32
    assert schedule(kind="linear").budget(40) == 64


def test_no_selection_in_warmup_and_one_at_the_freeze_step_whatever_the_interval():
    s = schedule(mask_interval_steps=7)
    steps = [t for t in range(100) if s.allocates(t)]
    assert steps == [14, 21, 28, 35, 42, 49, 56, 63, 70]
    assert schedule(mask_interval_steps=13).freeze_step == 70
    assert schedule(mask_interval_steps=13).allocates(70)


def test_without_final_phase_the_last_step_meets_the_budget():
    s = schedule(final_steps=0)
    assert s.freeze_step == 99 and s.allocates(99) and s.budget(99) == 32


def test_budget_equal_to_the_initial_one_prunes_nothing():
    s = schedule(target_budget=96)
    assert {s.budget(t) for t in range(100)} == {96}


@given(
    initial=st.integers(1, 500), share=st.floats(0, 1), total=st.integers(1, 300), phases=st.tuples(st.floats(0, 0.5),
    st.floats(0, 0.49)), interval=st.integers(1, 40), kind=st.sampled_from(["cubic", "linear"]),
)  # fmt: skip
def test_properties(initial, share, total, phases, interval, kind):
    s = BudgetSchedule(
        initial_budget=initial, target_budget=int(share * initial), total_steps=total,
        initial_warmup_steps=int(phases[0] * total), final_steps=int(phases[1] * total),
        mask_interval_steps=interval, kind=kind,
    )  # fmt: skip
    budgets = [s.budget(t) for t in range(total)]
    assert all(a >= b for a, b in zip(budgets, budgets[1:], strict=False))
    assert budgets[-1] == s.target_budget
    assert s.allocates(s.freeze_step) and not any(s.allocates(t) for t in range(s.freeze_step + 1, total))
    assert s.num_allocations >= 1


def test_phases_left_open_follow_from_the_length():
    s = BudgetSchedule.for_run(total_steps=1000, initial_budget=10, target_budget=5)
    assert (s.initial_warmup_steps, s.final_steps, s.mask_interval_steps) == (100, 300, 10)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_budget": 97}, "target_budget=97"),
        ({"target_budget": -1}, "target_budget=-1"),
        ({"initial_warmup_steps": 70}, "initial_warmup_steps=70"),
        ({"final_steps": -1}, "final_steps=-1"),
        ({"mask_interval_steps": 0}, "mask_interval_steps=0"),
        ({"total_steps": 0}, "total_steps=0"),
    ],
)
def test_impossible_schedules_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        schedule(**changes)
