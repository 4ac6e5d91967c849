"""benchmarks/experts.py: what adaptive rank over experts costs beside LoRA on them, and where the budget goes."""

import functools
import sys

import pytest

from adalora_dist.methods.adalora import bound, importance, products
from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from experts import cost, task  # noqa: E402

MAX_EXTRA_OPS = 64


@pytest.mark.parametrize("num_layers", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_every_step_adds_few_operations_however_many_layers_there_are(num_layers, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(importance, "_CHUNK", 2**30)  # a CPU takes the averages in pieces that fit its cache
    monkeypatch.setattr(bound, "CACHED_PORTION", 2**30)  # and all else
    monkeypatch.setattr(products, "_CACHED", 2**30)
    ours, lora, peft = cost(num_layers).values()
    for own, other in zip(ours, lora, strict=True):
        assert 0 < own.operations - other.operations <= MAX_EXTRA_OPS
    equal, ragged = ours[:-2], ours[-2:]
    assert {step.saved for step in equal} == {step.saved for step in lora} and equal[0].saved < peft[0].saved
    # The columns of Q in their places, 4 bytes each: at most as many as there were at the start.
    assert all(step.saved - lora[0].saved <= 4 * num_layers * 32 * (64 + 96) for step in ragged)


@functools.cache
def results(rare: bool):
    return task(rare)


@pytest.mark.slow
def test_the_budget_goes_to_the_experts_that_serve():
    for adaptive, uniform in zip(results(False)["adaptive"], results(False)["uniform (LoRA)"], strict=True):
        assert adaptive[1] > 0.9 and adaptive[0] < 0.2 * uniform[0]


@pytest.mark.slow
def test_scores_by_token_keep_experts_that_are_rarely_chosen():
    for by_step, by_token in zip(results(True)["adaptive"], results(True)["adaptive, by token"], strict=True):
        assert by_step[1] == 0 and by_token[1] > 0.2 and by_token[0] < 0.8 * by_step[0]
