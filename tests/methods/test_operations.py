"""What adaptive rank adds to a LoRA step of a model with LLaMA-7B's 224 matrices, counted: benchmarks/operations.py."""

import functools
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.ranks import run_ranks

sys.path.insert(0, str(ROOT / "benchmarks"))
from operations import MATRICES_PER_LAYER, count_run, extra  # noqa: E402

MAX_EXTRA_OPS = 64
WORLD_SIZE = {"single": 1, "ddp": 2, "fsdp2": 2, "zero3": 2}
CASES = [("single", 32), ("ddp", 32), ("fsdp2", 4), pytest.param("fsdp2", 32, marks=pytest.mark.slow)]
# FSDP2 never holds all P at once: each block has its products, for either of its two d_out the sum over rows; and its
# gradient, that of one parameter, is cut. At the freeze P is masked, once, in flat parts.
PER_BLOCK = {"single": 0, "ddp": 0, "fsdp2": 8}
AT_FREEZE = {"single": 0, "ddp": 0, "fsdp2": 2 * MATRICES_PER_LAYER}
MAX_OF_ENGINE = {"fsdp2": 10, "zero3": 20}
"""What an engine itself may add, a matrix, to the operations of a step on one process."""


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
    counts = zip(*(extra(ours, lora, part, "ops") for part in ("forward", "step")), strict=True)
    for number, (forward, step) in enumerate(counts):
        of_blocks = (PER_BLOCK[engine] + AT_FREEZE[engine] * (number == 2)) * num_layers
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


OF_ENGINES = [("fsdp2", "adalora", 4), ("fsdp2", "lora", 4), ("zero3", "adalora", 8)]
OF_ENGINES += [
    pytest.param(engine, method, 32, marks=pytest.mark.slow)
    for engine in MAX_OF_ENGINE
    for method in ("adalora", "lora")
]


@pytest.mark.parametrize(("engine", "method", "num_layers"), OF_ENGINES)
def test_an_engine_pays_once_for_the_adapters_of_a_block(engine, method, num_layers):
    """A LLaMA's seven matrices have fourteen adapter parameters; unpacked, that is 11 and 64 operations a matrix."""
    alone, sharded = (steps_of(each, method, num_layers) for each in ("single", engine))
    for number, counts in enumerate(
        zip(*(extra(sharded, alone, part, "ops") for part in ("forward", "step")), strict=True)
    ):
        of_matrix = sum(counts) / (num_layers * MATRICES_PER_LAYER)
        assert of_matrix > 1 and (of_matrix <= MAX_OF_ENGINE[engine] or (number == 2 and num_layers < 32))
