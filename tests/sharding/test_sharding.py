"""Every training engine shows the same gradients and values, in spans, and keeps what is written through it.

Each test looks at one property of the runs that ``sharding_runs.py`` makes, one per engine and configuration.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from adalora_dist.io.errors import UserError
from adalora_dist.sharding import select_engine
from adalora_dist.sharding.base import nonfinite_flag
from tests.support.ranks import run_ranks
from tests.support.sharding_runs import (
    MASK,
    MASKED,
    POISONED,
    SKIPPED,
    STILL,
    UNUSED,
    Case,
    Model,
    Trace,
    deepspeed,
    make_optimizer,
    stop_and_go_on,
    train,
)

needs_deepspeed = pytest.mark.skipif(deepspeed is None, reason="deepspeed is not installed")


def case(
    engine: str, world_size: int, accumulation: int = 1, clip: float = 0.0, precision: str = "fp32", **options: Any
):
    built = Case(engine, world_size, accumulation, clip, precision, tuple(options.items()))
    return pytest.param(built, id=str(built), marks=[needs_deepspeed] if engine.startswith("zero") else [])


@functools.cache
def run(case: Case) -> list[Trace]:
    return run_ranks(case.world_size, train, case)


def control_of(case: Case) -> Trace:
    options = tuple((k, v) for k, v in case.options if k == "num_groups")
    return run(Case("plain", 1, case.accumulation, case.clip, "fp32", options))[0]


CLIP = 0.05  # well below the gradient norm of this model
FP32 = [
    case("ddp", 2),
    case("ddp", 2, accumulation=4, clip=CLIP, num_groups=2),
    case("ddp", 2, fused=True),
    case("fsdp2", 2, fused=True),
    case("fsdp2", 2),
    case("fsdp2", 2, accumulation=4, clip=CLIP, reshard_after_forward=False, num_groups=2),
    case("fsdp2", 2, cpu_offload=True),
    case("fsdp2", 3, clip=CLIP),
    case("fsdp2", 4, clip=CLIP, mesh=(2, 2)),
    case("fsdp2", 8),  # more ranks than rows of any parameter
    case("zero1", 2),
    case("zero1", 2, accumulation=4, clip=CLIP, num_groups=2, round_robin_gradients=True),
    case("zero2", 2),
    case("zero2", 3, accumulation=4, clip=CLIP, num_groups=2, round_robin_gradients=True),
    case("zero2", 2, clip=CLIP, offload_optimizer="cpu"),
    case("zero2", 2, compute_grad_norm=False),
    case("zero3", 2, stage3_param_persistence_threshold=0),
    case("zero3", 2, accumulation=4, clip=CLIP, num_groups=2),
    case("zero3", 3, clip=CLIP, stage3_param_persistence_threshold=0, sub_group_size=10, num_groups=2),
    case("zero3", 3, stage3_param_persistence_threshold=100_000),
    case("zero3", 4, stage3_param_persistence_threshold=10, sub_group_size=10),  # rank 3 holds nothing of lambda
    case("zero3", 2, clip=CLIP, offload_optimizer="cpu", offload_param="cpu"),
]


LOW_PRECISION = [
    case("fsdp2", 2, precision="bf16"),
    case("zero1", 2, precision="bf16", num_groups=2),
    case("zero1", 3, precision="bf16", clip=CLIP, grad_accum_dtype="fp32"),
    case("zero2", 2, precision="bf16", round_robin_gradients=True, check_grad_overflow=False),
    case("zero2", 3, precision="fp16", clip=CLIP, num_groups=2),
    case("zero3", 2, precision="fp16", clip=CLIP, num_groups=2),
    case("zero2", 2, precision="bf16", accumulation=2, offload_optimizer="cpu", num_groups=2),
    case("zero3", 2, precision="bf16", stage3_param_persistence_threshold=0, sub_group_size=10),
    case("zero3", 3, precision="bf16", num_groups=2),
    case("zero3", 2, precision="bf16", offload_optimizer="cpu", offload_param="cpu", num_groups=2),
]
ADAPTER_NAMES = [f"{i}.{name}" for i in range(3) for name in ("P", "lam", "Qt")]


def assert_slices_equal(traces: list[Trace], control: Trace, what: str, step: int) -> None:
    """Each rank's local ``what`` of a step is its span of the control's."""
    for rank, trace in enumerate(traces):
        pairs = zip(trace.steps[step][what], control.steps[step][what], trace.spans, ADAPTER_NAMES, strict=True)
        for local, full, (start, stop), name in pairs:
            torch.testing.assert_close(
                local, full[start:stop], rtol=1e-3, atol=1e-5, msg=lambda m, r=rank, n=name: f"rank {r}, {n}: {m}"
            )


@pytest.mark.parametrize("case", FP32 + LOW_PRECISION)
def test_spans_partition_every_parameter(case: Case) -> None:
    traces = run(case)
    shards = traces[0].shards
    assert shards == {"plain": 1, "ddp": 1}.get(case.engine, dict(case.options).get("mesh", (case.world_size,))[-1])
    for first in range(0, case.world_size, shards):
        replica = traces[first : first + shards]
        assert [t.shard_rank for t in replica] == list(range(shards))
        for k, numel in enumerate(replica[0].num_elements):
            held = sorted(t.spans[k] for t in replica if t.spans[k][0] < t.spans[k][1])
            assert [i for start, stop in held for i in range(start, stop)] == list(range(numel))
            for t in replica:
                assert t.steps[0]["values"][k].numel() == t.spans[k][1] - t.spans[k][0]


@pytest.mark.parametrize("case", FP32)
def test_run_equals_one_process(case: Case) -> None:
    """Gradients and values in the hooks, an edited gradient's effect, full parameters, losses: all as in control."""
    traces, control = run(case), control_of(case)
    assert traces[0].engine == {"d": "PlainEngine", "f": "Fsdp2Engine", "z": "ZeroEngine"}[case.engine[0]]
    for step in range(POISONED):
        for what in ("values", "values_after") + (() if step == SKIPPED else ("gradients",)):
            assert_slices_equal(traces, control, what, step)
        for trace in traces:
            assert trace.steps[step]["loss"] == pytest.approx(control.steps[step]["loss"], rel=1e-5)
            torch.testing.assert_close(trace.steps[step]["full"], control.steps[step]["full"], rtol=1e-3, atol=1e-5)


def test_control_does_what_the_script_says() -> None:
    """Guards the comparison above: the edit, the clipping and the mask do change the run."""
    steps = run(Case("plain"))[0].steps
    clipped = run(Case("plain", clip=CLIP))[0].steps
    assert torch.cat(steps[0]["gradients"]).norm() > CLIP > torch.cat(clipped[0]["gradients"]).norm()
    assert all(g.count_nonzero() for g in steps[0]["gradients"])
    assert not any(g.count_nonzero() for g in steps[UNUSED]["gradients"][6:])
    assert steps[0]["loss"] > 1.01 * steps[2]["loss"]


@pytest.mark.parametrize("case", FP32 + LOW_PRECISION)
def test_unused_layer_has_zero_gradients(case: Case) -> None:
    """Not None, and not what is left of the step before."""
    for trace in run(case):
        assert not any(g.count_nonzero() for g in trace.steps[UNUSED]["gradients"][6:])


@pytest.mark.parametrize("case", FP32 + LOW_PRECISION)
def test_write_reaches_the_next_forward_and_survives_the_next_step(case: Case) -> None:
    """Step MASKED zeroes two of three lambdas after the update; step STILL has learning rate 0."""
    for trace in run(case):
        for layer in range(3):
            for step in (MASKED, STILL, SKIPPED):
                lam = trace.steps[step]["full"][3 * layer + 1]
                assert torch.equal(lam != 0, MASK.bool())
                seen_next = trace.steps[step + 1]["lam_seen"][layer]
                assert torch.equal(seen_next != 0, MASK.bool()), "the working copy differs from the master"
                torch.testing.assert_close(seen_next, lam, rtol=0.005 if case.precision != "fp32" else 0, atol=0)
            assert trace.steps[SKIPPED + 1]["full"][3 * layer + 1].count_nonzero() == 3, "masked lambdas may grow again"


@pytest.mark.parametrize("case", FP32 + LOW_PRECISION)
def test_skipped_step_changes_nothing(case: Case) -> None:
    for trace in run(case):
        record, before = trace.steps[SKIPPED], trace.steps[SKIPPED - 1]
        assert record["moments_untouched"]
        assert all(map(torch.equal, record["values"], record["values_after"]))
        assert all(map(torch.equal, before["full"], record["full"]))
        assert not all(map(torch.equal, record["full"], trace.steps[SKIPPED + 1]["full"])), "training went on"


@pytest.mark.parametrize("case", FP32 + LOW_PRECISION)
def test_nonfinite_gradient_of_another_parameter_skips_all_ranks(case: Case) -> None:
    """Only the head's bias had one. ZeRO mostly skips the step by itself; otherwise every rank must agree on it."""
    traces = run(case)
    reached = ["nonfinite" in trace.steps[POISONED] for trace in traces]
    skipped_by_zero = case.engine.startswith("zero") and not any(reached)
    assert skipped_by_zero or all(reached)
    if case.engine in ("ddp", "fsdp2"):
        assert all(reached)
    for trace in traces:
        assert all(trace.steps[s]["nonfinite"] == 0 for s in range(POISONED))
        assert skipped_by_zero or trace.steps[POISONED]["nonfinite"] > 0
        assert all(map(torch.equal, trace.steps[POISONED - 1]["full"], trace.steps[POISONED]["full"]))
        assert all(full.isfinite().all() for full in trace.steps[POISONED]["full"])


@pytest.mark.parametrize(
    "case", [c for c in FP32 if c.values[0].world_size > 3 and "mesh" not in dict(c.values[0].options)]
)
def test_some_rank_holds_nothing(case: Case) -> None:
    """World size above r: the runs compared above did include empty spans."""
    assert run(case)[-1].spans[1] == (3, 3)


RESTORED = [
    case("plain", 1),
    case("fsdp2", 3),
    case("zero1", 2, precision="bf16", num_groups=2),
    case("zero3", 2, stage3_param_persistence_threshold=0),
]
MORE_RESTORED = [
    case("ddp", 2, num_groups=2),
    case("fsdp2", 4, mesh=(2, 2)),
    case("fsdp2", 2, cpu_offload=True),
    case("zero1", 3, precision="bf16", grad_accum_dtype="fp32"),
    case("zero2", 3, accumulation=2, num_groups=2, round_robin_gradients=True),
    case("zero2", 2, offload_optimizer="cpu"),
    case("zero3", 3, stage3_param_persistence_threshold=10, sub_group_size=10, num_groups=2),
    case("zero3", 2, precision="bf16", offload_optimizer="cpu", offload_param="cpu"),
]


@pytest.mark.parametrize("case", RESTORED)
def test_a_fresh_engine_goes_on_from_what_another_held(case: Case) -> None:
    assert_goes_on(case, stop=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "stop"), [(c.values[0], stop) for c in RESTORED + MORE_RESTORED for stop in (0, 3)], ids=str
)
def test_every_fresh_engine_goes_on_from_what_another_held(case: Case, stop: int) -> None:
    assert_goes_on(case, stop)


def assert_goes_on(case: Case, stop: int) -> None:
    """Bit for bit, weights and optimizer state; at 0 there is no state yet."""
    first = run_ranks(case.world_size, stop_and_go_on, case, stop)
    again = run_ranks(case.world_size, stop_and_go_on, case, stop, [held for held, _, _ in first])
    for (held, end, seen), (held_again, end_again, seen_again) in zip(first, again, strict=True):
        assert held.shapes == [(7, 3), (3,), (5, 3), (5, 3), (3,), (7, 3), (5, 3), (3,), (5, 3), (2, 5), (2,)]
        assert all(map(torch.equal, seen, seen_again)), "the first forward used other weights"
        for old, new in ((held, held_again), (end, end_again)):
            assert all(map(torch.equal, old.values, new.values))
            for a, b in zip(old.states, new.states, strict=True):
                assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        assert all(not state for state in held.states) if stop == 0 else all(s["step"] == 3 for s in held.states)
        assert any(not torch.equal(a, b) for a, b in zip(held.values, end.values, strict=True))


NO_CHECK = [
    c for c in FP32 + LOW_PRECISION if {"compute_grad_norm", "check_grad_overflow"} & dict(c.values[0].options).keys()
]


@pytest.mark.parametrize("case", NO_CHECK)
def test_zero_without_its_checks_lets_nonfinite_steps_through(case: Case) -> None:
    """So the engine's own flag is needed, and the test above saw it."""
    assert all(trace.steps[POISONED]["nonfinite"] > 0 for trace in run(case))


@pytest.mark.parametrize("case", LOW_PRECISION)
def test_low_precision_gradients_are_unscaled_and_clipped(case: Case) -> None:
    """In size and direction what fp32 sees: no loss scale, no world size, no accumulation factor left in them."""
    control = control_of(case)
    for trace in run(case):
        pairs = zip(trace.steps[0]["gradients"], control.steps[0]["gradients"], trace.spans, strict=True)
        local, full = zip(*((g, c[start:stop]) for g, c, (start, stop) in pairs), strict=True)
        error = (torch.cat(local) - torch.cat(full)).norm() / torch.cat(full).norm()
        assert error < 0.05


def _refusals(rank: int, world_size: int) -> list[str]:
    mesh = init_device_mesh("cpu", (world_size,))
    messages = []

    def refuse(params: list[torch.Tensor], optimized: list[torch.Tensor]) -> None:
        with pytest.raises(UserError) as error:
            select_engine(params, torch.optim.AdamW(optimized))
        messages.append(str(error.value))

    model = Model()
    params = model.adapter_parameters()
    refuse(params, params[:-1])
    fully_shard(model.adapters[0], mesh=mesh)
    mixed = model.adapter_parameters()
    refuse(mixed, mixed)
    columns = nn.Linear(4, 7)
    fully_shard(columns, mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    refuse([columns.weight], [columns.weight])
    return messages


def test_refusals_name_what_is_wrong() -> None:
    for messages in run_ranks(2, _refusals):
        missing, mixed, columns = messages
        assert "1 of 9 parameters are not in the optimizer" in missing
        assert "3 of 9 parameters are sharded" in mixed
        assert "(7, 4)" in columns and "Shard(dim=1)" in columns


def _stage_0(rank: int, world_size: int) -> str:
    model = Model()
    optimizer = make_optimizer(model, 1)
    optimizer.register_step_pre_hook(lambda opt, *_: select_engine(model.adapter_parameters(), opt))
    config = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}
    with pytest.raises(UserError) as error:  # its first step is one with zero gradients, while it is set up
        deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return str(error.value)


@needs_deepspeed
def test_deepspeed_stage_0_with_bf16_is_refused() -> None:
    assert "stage from 1 to 3" in run_ranks(2, _stage_0)[0]


def _adagrad(rank: int, world_size: int) -> list[str]:
    messages = []
    for stage in (2, 3):
        model = Model()
        optimizer = torch.optim.Adagrad(model.adapter_parameters(), lr=0.1)
        config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        with pytest.raises(UserError) as error:
            select_engine(model.adapter_parameters(), engine.optimizer)
        messages.append(str(error.value))
    return messages


@needs_deepspeed
def test_an_adagrad_of_deepspeeds_own_is_refused() -> None:
    [messages] = run_ranks(1, _adagrad)
    assert all("use RMSprop or AdamW" in message for message in messages)


def test_nonfinite_flag() -> None:
    clean = [torch.ones(3), torch.ones(2, 2, dtype=torch.bfloat16), torch.empty(0)]
    assert nonfinite_flag([]) == 0 and nonfinite_flag(clean) == 0
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert nonfinite_flag([*clean, torch.tensor([0.0, bad])]) == 1
    assert nonfinite_flag([torch.full((4,), 1e18)]) == 0
    assert nonfinite_flag([torch.full((4,), 1e20)]) == 1, "its square, Adam's second moment, is infinite"
