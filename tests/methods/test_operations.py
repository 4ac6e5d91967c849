"""What adaptive rank adds to a LoRA step of a model with LLaMA-7B's 224 matrices, counted: benchmarks/operations.py."""

import functools
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.ranks import run_ranks

sys.path.insert(0, str(ROOT / "benchmarks"))
from operations import MATRICES_PER_LAYER, count_run, extra  # noqa: E402

MAX_EXTRA_OPS = 64
WORLD_SIZE = {"single": 1, "ddp": 2, "fsdp2": 2}
CASES = [("single", 32), ("ddp", 32), ("fsdp2", 4), pytest.param("fsdp2", 32, marks=pytest.mark.slow)]
# FSDP2 never holds all P at once: each block has its products, for either of its two d_out the sum over rows.
PER_BLOCK = {"single": 0, "ddp": 0, "fsdp2": 7}


@functools.cache
def steps_of(engine: str, method: str, num_layers: int):
    return run_ranks(WORLD_SIZE[engine], count_run, engine, method, num_layers)[0][2:]  # the first two set things up


@pytest.mark.parametrize(("engine", "num_layers"), CASES)
def test_there_is_something_to_count(engine, num_layers):
    """Guards the zeros below."""
    steps = steps_of(engine, "adalora", num_layers)
    assert [s["allocates"] for s in steps] == [False, True, True, False]
    assert steps[0]["forward"]["ops"] > 20 * num_layers * MATRICES_PER_LAYER > 0
    assert steps[0]["step"]["names"]["_fused_adamw_"] == 1 and steps[2]["step"]["late_reads"] == 1


@pytest.mark.parametrize(("engine", "num_layers"), CASES)
def test_a_step_adds_a_constant_number_of_operations_and_no_host_read(engine, num_layers):
    """Forward, backward and the optimizer's step, with a selection or without."""
    ours, lora = (steps_of(engine, method, num_layers) for method in ("adalora", "lora"))
    of_blocks = PER_BLOCK[engine] * num_layers
    for forward, step in zip(*(extra(ours, lora, part, "ops") for part in ("forward", "step")), strict=True):
        assert 0 < forward + step - of_blocks <= MAX_EXTRA_OPS
    for part in ("forward", "step"):
        assert all(step[part]["host_reads"] == 0 for step in ours)


def test_the_counter_sees_a_host_read():
    """An optimizer that cannot leave a step out by itself needs one per step."""
    steps = run_ranks(1, count_run, "single", "adalora", 1, False)[0]
    assert all(step["step"]["host_reads"] >= 1 for step in steps)


@pytest.mark.parametrize(("engine", "num_layers"), CASES)
def test_at_most_one_collective_more_per_step_and_one_per_allocation(engine, num_layers):
    """LoRA's own check for non-finite gradients is a sum over shards; the regulariser rides on it.

    Lambda is FSDP2's business with what lies outside of its blocks, where a LoRA without a head trains nothing.
    """
    ours, lora = (steps_of(engine, method, num_layers) for method in ("adalora", "lora"))
    assert set(extra(ours, lora, "forward", "collectives")) == {int(engine == "fsdp2")}
    for step, more in zip(ours, extra(ours, lora, "step", "collectives"), strict=True):
        assert more == (step["allocates"] and WORLD_SIZE[engine] > 1)
    assert all(step["step"]["collectives"] == (engine == "fsdp2") for step in lora)
