"""Experts on real ranks: the same patterns at every allocation as on one process, and the same losses."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.support.expert_runs import OF_LAST, SETTINGS, UNUSED, Case, run, run_all
from tests.support.ranks import import_deepspeed, run_ranks

import_deepspeed()  # or skip

MORE = (Case("ddp", 2), Case("fsdp2", 3), Case("zero2", 2), Case("zero3", 2))
CASES = [Case("fsdp2", 2), *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)]


@functools.cache
def alone() -> dict[str, Any]:
    [result] = run_ranks(1, run, Case("single"))
    return result


def name_of(expert: int) -> str:
    return f"model.layers.0.mlp.experts.{expert}."


def test_an_expert_without_tokens_loses_its_budget():
    ranks = alone()["ranks"]
    assert sum(ranks.values()) == round(SETTINGS.target_rank * len(ranks)) and len(ranks) == 2 * (2 * 4 + 1)
    assert not any(rank for name, rank in ranks.items() if name.startswith(name_of(UNUSED)))
    assert any(rank for name, rank in ranks.items() if name.startswith(name_of(OF_LAST)))
    assert any(len(set(of_stack)) > 1 for of_stack in alone()["held"])


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert all(found[key] == expected[key] for key in ("patterns", "ranks", "held"))
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-5, atol=1e-5)
    for name, delta in expected["deltas"].items():
        torch.testing.assert_close(found["deltas"][name], delta, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.engine}-{case.world_size}")
def test_ranks_select_and_learn_as_one_process_does(case):
    for result in run_ranks(case.world_size, run, case):
        assert_same(result, alone())


@functools.cache
def all_alone() -> dict[str, dict[str, Any]]:
    [results] = run_ranks(1, run_all, Case("single"), timeout=600)
    return results


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", (Case("fsdp2", 2), *MORE), ids=lambda case: f"{case.engine}-{case.world_size}")
def test_all_mixtures_select_and_learn_as_on_one_process(case):
    for results in run_ranks(case.world_size, run_all, case, timeout=600):
        for kind, result in results.items():
            assert_same(result, all_alone()[kind])
