"""Every training engine shows the same gradients and values, in spans, and keeps what is written through it.

One short training run per engine, on real ranks, goes through everything that can happen to a step; the same run in
one process is the control. Each test then looks at one property of the recorded runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import import_deepspeed, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from adalora_dist.errors import UserError
from adalora_dist.sharding import select_engine
from adalora_dist.sharding.base import ShardEngine, nonfinite_flag, sum_over

try:
    deepspeed = import_deepspeed()
except pytest.skip.Exception:
    deepspeed = None

RANK = 3
GLOBAL_BATCH = 24  # divisible by every world size times the accumulation
UNUSED, EDITED, MASKED, STILL, SKIPPED, _, POISONED = range(1, 8)  # what happens at which step; others are normal
NUM_STEPS = 8
MASK = torch.tensor([0.0, 1.0, 0.0])


class Adapter(nn.Module):
    """A frozen weight and one adapter; remembers the lambda that its forward used."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in) / d_in**0.5, requires_grad=False)
        self.P = nn.Parameter(0.3 * torch.randn(d_out, RANK))
        self.lam = nn.Parameter(torch.randn(RANK) + 2)
        self.Qt = nn.Parameter(0.3 * torch.randn(d_in, RANK))
        self.lam_seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.lam_seen = self.lam.detach().float().clone()
        return torch.tanh(x @ self.weight.T + (x @ self.Qt * self.lam) @ self.P.T)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList([Adapter(5, 7), Adapter(7, 5), Adapter(5, 5)])
        self.head = nn.Linear(5, 2)  # trained, but no adapter

    def forward(self, x: torch.Tensor, step: int, poison: bool) -> torch.Tensor:
        for index, adapter in enumerate(self.adapters):
            if not (index == 2 and step == UNUSED):
                x = adapter(x)
        y = self.head(x)
        if poison:  # adds 0, but the gradient of the head's bias, and of nothing else, is infinite
            y = y + (self.head.bias - self.head.bias.detach()).sqrt()
        return y

    def adapter_parameters(self) -> list[torch.Tensor]:
        return [getattr(a, name) for a in self.adapters for name in ("P", "lam", "Qt")]


@dataclass(frozen=True)
class Case:
    """One engine in one configuration."""

    engine: str
    world_size: int = 1
    accumulation: int = 1
    clip: float = 0.0
    bf16: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        options = "-".join(f"{k}={v}" for k, v in self.options)
        bf16 = "-bf16" if self.bf16 else ""
        return f"{self.engine}{bf16}-x{self.world_size}-acc{self.accumulation}-clip{self.clip}{'-' + options if options else ''}"


def case(engine: str, world_size: int = 1, accumulation: int = 1, clip: float = 0.0, bf16: bool = False, **options: Any):
    needs_deepspeed = pytest.mark.skipif(deepspeed is None, reason="deepspeed is not installed")
    built = Case(engine, world_size, accumulation, clip, bf16, tuple(options.items()))
    return pytest.param(built, id=str(built), marks=[needs_deepspeed] if engine.startswith("zero") else [])


@dataclass
class Trace:
    """What one rank saw, per step."""

    spans: list[tuple[int, int]] = field(default_factory=list)
    num_elements: list[int] = field(default_factory=list)
    shards: int = 1
    shard_rank: int = 0
    steps: list[dict[str, Any]] = field(default_factory=list)
    engine: str = ""


class Probe:
    """The allocator's place in the hooks, with a script instead of a method."""

    def __init__(self, model: Model, optimizer: torch.optim.Optimizer, trace: Trace) -> None:
        self.model, self.trace = model, trace
        self.engine: ShardEngine | None = None
        self.firing, self.step = 0, 0
        optimizer.register_step_pre_hook(lambda opt, *_: self.before(opt))
        optimizer.register_step_post_hook(lambda opt, *_: self.after(opt))

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer) -> None:
        if self.engine is None:
            self.engine = select_engine(self.model.adapter_parameters(), optimizer)
            self.trace.engine = type(self.engine).__name__
            self.trace.spans = [tuple(span) for span in self.engine.spans()]
            if self.engine.shard_group is not None:
                self.trace.shards = dist.get_world_size(self.engine.shard_group)
                self.trace.shard_rank = dist.get_rank(self.engine.shard_group)
        if self.firing == 0:
            values = [v.float().clone() for v in self.engine.values()]
            flag = float(sum_over(self.engine.shard_group, self.engine.nonfinite()))
            self.record = {"values": values, "gradients": [None] * len(values), "nonfinite": flag}
            self.moments = _moments(optimizer)
            self.trace.steps.append(self.record)
            self.skip = flag > 0 or self.step == SKIPPED
        if self.skip:
            self.engine.skip_firing()
            return
        for k, gradient in enumerate(self.engine.gradients()):
            if gradient is not None:
                assert self.record["gradients"][k] is None, "seen in two firings"
                self.record["gradients"][k] = gradient.float().clone()
                if self.step == EDITED:
                    gradient.add_(self.record["values"][k], alpha=0.1)
        if self.step == STILL:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        if self.step == SKIPPED + 1:
            for group in optimizer.param_groups:
                group["lr"] = group["initial"]

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.engine is not None
        self.firing += 1
        if self.firing < self.engine.num_firings:
            return
        self.firing = 0
        values = self.engine.values()
        if self.skip:
            pairs = zip(_moments(optimizer), self.moments, strict=True)
            self.record["moments_untouched"] = all(torch.equal(a, b) for a, b in pairs)
        if self.step == MASKED:
            for k in range(1, len(values), 3):
                start, stop = self.trace.spans[k]
                self.engine.write(k, values[k] * MASK[start:stop].to(values[k]))
        self.record["values_after"] = [v.float().clone() for v in self.engine.values()]
        self.step += 1


def _moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = optimizer.state.values()
    tensors = [t.to_local() if hasattr(t, "to_local") else t for s in states for t in s.values() if torch.is_tensor(t)]
    return [t.clone() for t in tensors]


def make_optimizer(model: Model, num_groups: int) -> torch.optim.Optimizer:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lams = [p for name, p in trained.items() if name.endswith("lam")]
    others = [p for name, p in trained.items() if not name.endswith("lam")]
    if num_groups == 1:
        groups = [{"params": list(trained.values()), "lr": 0.03}]
    else:
        groups = [{"params": others, "lr": 0.03, "weight_decay": 0.1}, {"params": lams, "lr": 0.02}]
    return torch.optim.AdamW([g | {"initial": g["lr"]} for g in groups], eps=1e-4)  # damps rounding of small gradients


def train(rank: int, world_size: int, case: Case) -> Trace:
    """The scripted run. Returns what this rank saw."""
    torch.manual_seed(0)
    options = dict(case.options)
    model, trace = Model(), Trace()
    trace.num_elements = [p.numel() for p in model.adapter_parameters()]
    backward_and_step, probe, forward = _set_up(case, model, options, trace)
    data = torch.Generator().manual_seed(1)
    rows = GLOBAL_BATCH // world_size // case.accumulation
    for step in range(NUM_STEPS):
        x, y = torch.randn(GLOBAL_BATCH, 5, generator=data), torch.randn(GLOBAL_BATCH, 2, generator=data)
        num_seen = len(trace.steps)
        losses = []
        for micro in range(case.accumulation):
            chunk = slice((micro * world_size + rank) * rows, (micro * world_size + rank + 1) * rows)
            dtype = torch.bfloat16 if case.bf16 and case.engine.startswith("zero") else torch.float32
            output = forward(x[chunk].to(dtype), step, step == POISONED and rank == 0)
            loss = (output.float() - y[chunk]).square().mean()
            losses.append(loss.detach())
            backward_and_step(loss, micro == case.accumulation - 1)
        if len(trace.steps) == num_seen:
            trace.steps.append({"not_reached": True})
        mean = torch.stack(losses).mean() / world_size
        dist.all_reduce(mean)
        trace.steps[-1]["loss"] = float(mean)
        trace.steps[-1]["lam_seen"] = [a.lam_seen for a in model.adapters]
        trace.steps[-1]["full"] = [probe.engine.full(k) for k in range(9)]
    return trace


def _set_up(case: Case, model: Model, options: dict[str, Any], trace: Trace) -> tuple[Callable, Probe, Callable]:
    """``(backward_and_step(loss, is_last), probe, forward)`` of a case."""
    num_groups = options.pop("num_groups", 1)
    if case.engine == "fsdp2":
        shape = options.pop("mesh", (case.world_size,))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        kwargs: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": options.pop("reshard_after_forward", True)}
        if options.pop("cpu_offload", False):
            kwargs["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        if case.bf16:
            kwargs["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for adapter in model.adapters:
            fully_shard(adapter, **kwargs)
        fully_shard(model, **kwargs)
    optimizer = make_optimizer(model, num_groups)
    probe = Probe(model, optimizer, trace)
    if case.engine.startswith("zero"):
        config = {
            "train_micro_batch_size_per_gpu": GLOBAL_BATCH // case.world_size // case.accumulation,
            "gradient_accumulation_steps": case.accumulation,
            "gradient_clipping": case.clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": case.bf16},
            "data_types": {"grad_accum_dtype": options.pop("grad_accum_dtype", None)},
            "zero_optimization": {"stage": int(case.engine[-1])}
            | {k: {"device": v} if k.startswith("offload") else v for k, v in options.items()},
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

        def step_zero(loss: torch.Tensor, is_last: bool) -> None:
            engine.backward(loss)
            engine.step()

        return step_zero, probe, engine
    forward = DistributedDataParallel(model, find_unused_parameters=True) if case.engine == "ddp" else model

    def step_torch(loss: torch.Tensor, is_last: bool) -> None:
        if case.engine == "fsdp2":
            model.set_requires_gradient_sync(is_last)
        (loss / case.accumulation).backward()
        if is_last:
            if case.clip:
                nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], case.clip)
            optimizer.step()
            optimizer.zero_grad()

    return step_torch, probe, forward


@functools.cache
def run(case: Case) -> list[Trace]:
    return run_ranks(case.world_size, train, case)


def control_of(case: Case) -> Trace:
    options = tuple((k, v) for k, v in case.options if k == "num_groups")
    return run(Case("plain", 1, case.accumulation, case.clip, False, options))[0]


CLIP = 0.05  # well below the gradient norm of this model
FP32 = [
    case("ddp", 2),
    case("ddp", 2, accumulation=4, clip=CLIP, num_groups=2),
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


BF16 = [
    case("fsdp2", 2, bf16=True),
    case("zero1", 2, bf16=True, num_groups=2),
    case("zero1", 3, bf16=True, clip=CLIP, grad_accum_dtype="fp32"),
    case("zero2", 2, bf16=True, round_robin_gradients=True),
    case("zero2", 2, bf16=True, accumulation=2, offload_optimizer="cpu", num_groups=2),
    case("zero3", 2, bf16=True, stage3_param_persistence_threshold=0, sub_group_size=10),
    case("zero3", 3, bf16=True, num_groups=2),
    case("zero3", 2, bf16=True, offload_optimizer="cpu", offload_param="cpu", num_groups=2),
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


@pytest.mark.parametrize("case", FP32 + BF16)
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


@pytest.mark.parametrize("case", FP32 + BF16)
def test_unused_layer_has_zero_gradients(case: Case) -> None:
    """Not None, and not what is left of the step before."""
    for trace in run(case):
        assert not any(g.count_nonzero() for g in trace.steps[UNUSED]["gradients"][6:])


@pytest.mark.parametrize("case", FP32 + BF16)
def test_write_reaches_the_next_forward_and_survives_the_next_step(case: Case) -> None:
    """Step MASKED zeroes two of three lambdas after the update; step STILL has learning rate 0."""
    for trace in run(case):
        for layer in range(3):
            for step in (MASKED, STILL, SKIPPED):
                lam = trace.steps[step]["full"][3 * layer + 1]
                assert torch.equal(lam != 0, MASK.bool())
                seen_next = trace.steps[step + 1]["lam_seen"][layer]
                assert torch.equal(seen_next != 0, MASK.bool()), "the working copy differs from the master"
                torch.testing.assert_close(seen_next, lam, rtol=0.005 if case.bf16 else 0, atol=0)
            assert trace.steps[SKIPPED + 1]["full"][3 * layer + 1].count_nonzero() == 3, "masked lambdas may grow again"


@pytest.mark.parametrize("case", FP32 + BF16)
def test_skipped_step_changes_nothing(case: Case) -> None:
    for trace in run(case):
        record, before = trace.steps[SKIPPED], trace.steps[SKIPPED - 1]
        assert record["moments_untouched"]
        assert all(map(torch.equal, record["values"], record["values_after"]))
        assert all(map(torch.equal, before["full"], record["full"]))
        assert not all(map(torch.equal, record["full"], trace.steps[SKIPPED + 1]["full"])), "training went on"


@pytest.mark.parametrize("case", FP32 + BF16)
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


@pytest.mark.parametrize("case", [c for c in FP32 if c.values[0].world_size > 3 and "mesh" not in dict(c.values[0].options)])
def test_some_rank_holds_nothing(case: Case) -> None:
    """World size above r: the runs compared above did include empty spans."""
    assert run(case)[-1].spans[1] == (3, 3)


@pytest.mark.skipif(deepspeed is None, reason="deepspeed is not installed")
def test_bf16_zero_lets_nonfinite_steps_through() -> None:
    """So the engine's own flag is needed, and the run above tested it."""
    (param,) = [c for c in BF16 if c.values[0].engine == "zero1" and c.values[0].world_size == 2]
    assert all(trace.steps[POISONED]["nonfinite"] > 0 for trace in run(param.values[0]))


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
        assert "1 of 9 adapter parameters are not in the optimizer" in missing
        assert "3 of 9 adapter parameters are sharded" in mixed
        assert "(7, 4)" in columns and "Shard(dim=1)" in columns


def _stage_0(rank: int, world_size: int) -> str:
    model = Model()
    optimizer = make_optimizer(model, 1)
    optimizer.register_step_pre_hook(lambda opt, *_: select_engine(model.adapter_parameters(), opt))
    config = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}
    with pytest.raises(UserError) as error:  # its first step is one with zero gradients, while it is set up
        deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return str(error.value)


@pytest.mark.skipif(deepspeed is None, reason="deepspeed is not installed")
def test_deepspeed_stage_0_with_bf16_is_refused() -> None:
    assert "stage from 1 to 3" in run_ranks(2, _stage_0)[0]


def test_nonfinite_flag() -> None:
    clean = [torch.ones(3), torch.ones(2, 2, dtype=torch.bfloat16), torch.empty(0)]
    assert nonfinite_flag([]) == 0 and nonfinite_flag(clean) == 0
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert nonfinite_flag([*clean, torch.tensor([0.0, bad])]) == 1
    assert nonfinite_flag([torch.full((4,), 3e38)]) == 0, "large is not infinite, though its square is"
