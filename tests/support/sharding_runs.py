"""One scripted training run per engine, on real ranks, through everything that can happen to a step.

The same run in one process is the control. ``test_sharding.py`` looks at what was recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from adalora_dist.sharding import select_engine
from adalora_dist.sharding.base import ShardEngine, sum_over
from tests.support.ranks import import_deepspeed

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
    precision: str = "fp32"
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        options = [f"{k}={v}" for k, v in self.options]
        return "-".join([self.engine, self.precision, f"x{self.world_size}", f"acc{self.accumulation}", *options])


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
        self.model, self.trace, self.optimizer = model, trace, optimizer
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
            values = [v.float().flatten().clone() for v in self.engine.values()]
            flag = float(sum_over(self.engine.shard_group, self.engine.nonfinite()))
            self.record = {"values": values, "gradients": [None] * len(values), "nonfinite": flag}
            self.moments = _moments(optimizer)
            self.trace.steps.append(self.record)
            self.skip = flag > 0 or self.step == SKIPPED
        if self.skip:
            self.engine.skip_firing_if(torch.ones(()))
            return
        self.engine.skip_firing_if(torch.zeros(()))
        for k, gradient in enumerate(self.engine.gradients()):
            if gradient is not None:
                assert self.record["gradients"][k] is None, "seen in two firings"
                self.record["gradients"][k] = gradient.float().flatten().clone()
                if self.step == EDITED:
                    gradient.add_(self.record["values"][k].view_as(gradient), alpha=0.1)
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
            lams = range(1, len(values), 3)
            masks = [MASK[slice(*self.trace.spans[k])].to(values[k]) for k in lams]
            self.engine.write(lams, [values[k] * mask for k, mask in zip(lams, masks, strict=True)])
        self.record["values_after"] = [v.float().flatten().clone() for v in self.engine.values()]
        self.step += 1


def _moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = optimizer.state.values()
    tensors = [t.to_local() if hasattr(t, "to_local") else t for s in states for t in s.values() if torch.is_tensor(t)]
    return [t.clone() for t in tensors]


def make_optimizer(model: Model, num_groups: int, fused: bool = False) -> torch.optim.Optimizer:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lams = [p for name, p in trained.items() if name.endswith("lam")]
    others = [p for name, p in trained.items() if not name.endswith("lam")]
    if num_groups == 1:
        groups = [{"params": list(trained.values()), "lr": 0.03}]
    else:
        # lambda in the group that ZeRO steps first: a mask written after the last one finds its copying done
        groups = [{"params": lams, "lr": 0.02}, {"params": others, "lr": 0.03, "weight_decay": 0.1}]
    groups = [g | {"initial": g["lr"]} for g in groups]
    return torch.optim.AdamW(groups, eps=1e-4, fused=fused)  # eps damps rounding of small gradients


def train(rank: int, world_size: int, case: Case) -> Trace:
    """The scripted run. Returns what this rank saw."""
    torch.manual_seed(0)
    options = dict(case.options)
    model, trace = Model(), Trace()
    trace.num_elements = [p.numel() for p in model.adapter_parameters()]
    backward_and_step, probe, forward = _set_up(case, model, options, trace)
    data = torch.Generator().manual_seed(1)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.precision, torch.float32)
    rows = GLOBAL_BATCH // world_size // case.accumulation
    for step in range(NUM_STEPS):
        x, y = torch.randn(GLOBAL_BATCH, 5, generator=data), torch.randn(GLOBAL_BATCH, 2, generator=data)
        num_seen = len(trace.steps)
        losses = []
        for micro in range(case.accumulation):
            chunk = slice((micro * world_size + rank) * rows, (micro * world_size + rank + 1) * rows)
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


@dataclass
class Held:
    """Of every trained parameter, the head's included: what one rank holds of it and of the optimizer's state."""

    shapes: list[torch.Size]
    values: list[torch.Tensor]
    states: list[dict[str, torch.Tensor]]


def hold(engine: ShardEngine) -> Held:
    states = [{name: t.clone() for name, t in state.items()} for state in engine.states()]
    return Held(engine.shapes(), [v.clone() for v in engine.values()], states)


def stop_and_go_on(
    rank: int, world_size: int, case: Case, stop: int, saved: list[Held] | None = None
) -> tuple[Held, Held, list[torch.Tensor]]:
    """Trains to ``stop`` and two steps more, or those two alone, in a fresh engine that gets ``saved``.

    Returns what was held at ``stop`` and at the end, and the lambdas that the first forward after ``stop`` used.
    """
    torch.manual_seed(0)
    model = Model()
    step_with, probe, forward = _set_up(case, model, dict(case.options), Trace())
    wrapped = forward if case.engine.startswith("zero") else probe.optimizer
    engine = select_engine([p for p in model.parameters() if p.requires_grad], wrapped)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.precision, torch.float32)
    if saved is not None:
        engine.restore(saved[rank].values, saved[rank].states)
        held, probe.step = hold(engine), stop
    for step in range(0 if saved is None else stop, stop + 2):
        if step == stop and saved is None:
            held = hold(engine)
        x = torch.randn(world_size, 6, 5, generator=torch.Generator().manual_seed(step))[rank]
        for micro in range(case.accumulation):
            step_with(forward(x.to(dtype), -1, False).float().square().mean(), micro == case.accumulation - 1)
        if step == stop:
            seen = [adapter.lam_seen for adapter in model.adapters]
    return held, hold(engine), seen


def _set_up(case: Case, model: Model, options: dict[str, Any], trace: Trace) -> tuple[Callable, Probe, Callable]:
    """``(backward_and_step(loss, is_last), probe, forward)`` of a case."""
    num_groups = options.pop("num_groups", 1)
    if case.engine == "fsdp2":
        shape = options.pop("mesh", (case.world_size,))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        kwargs: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": options.pop("reshard_after_forward", True)}
        if options.pop("cpu_offload", False):
            kwargs["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        if case.precision == "bf16":
            kwargs["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for adapter in model.adapters:
            fully_shard(adapter, **kwargs)
        fully_shard(model, **kwargs)
    optimizer = make_optimizer(model, num_groups, options.pop("fused", False))
    probe = Probe(model, optimizer, trace)
    if case.engine.startswith("zero"):
        # DeepSpeed refuses fp16 on a CPU for its speed; it does work.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
        config = {
            "train_micro_batch_size_per_gpu": GLOBAL_BATCH // case.world_size // case.accumulation,
            "gradient_accumulation_steps": case.accumulation,
            "gradient_clipping": case.clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {
                "enabled": case.precision == "bf16",
                "check_grad_overflow": options.pop("check_grad_overflow", True),
            },
            "fp16": {"enabled": case.precision == "fp16", "initial_scale_power": 8},
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
