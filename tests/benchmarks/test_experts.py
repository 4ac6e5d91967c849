"""benchmarks/experts.py: what adaptive rank over experts costs beside LoRA on them, and where the budget goes."""

import functools
import sys

import pytest

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from experts import cost, task  # noqa: E402

MAX_EXTRA_OPS = 64


def test_a_step_adds_few_operations_and_saves_no_more_than_lora():
    pytest.importorskip("peft")
    found = cost()
    ours, lora, peft = (found[name] for name in ("adaptive ranks", "LoRA", "PEFT, target_parameters"))
    assert 0 < ours["operations"] - lora["operations"] <= MAX_EXTRA_OPS
    assert ours["saved"] == lora["saved"] < peft["saved"]


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
