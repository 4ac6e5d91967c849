"""Identical ranks everywhere: one control (one process), one experiment per engine, on real gloo processes.

Same global batches, float32. Through warm-up, pruning and the frozen phase the selected triplets must be equal at
every allocation and the losses equal within 1e-5 relative.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from adalora_dist.config.methods import AdaLoraConfig
from adalora_dist.methods.adalora.layers import LAMBDAS_NAME
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.packing import pack_adapters
from tests.support.engine_steps import backward_and_step, zero_engine
from tests.support.models import adapted_net, config, global_batch
from tests.support.ranks import import_deepspeed, run_ranks

deepspeed = import_deepspeed()

STEPS = 45
GLOBAL_BATCH = 48  # divides by 1, 2, 3, 4 ranks times 4 micro-steps
SETTINGS = config(initial_warmup_steps=5, final_steps=15, mask_interval_steps=3)


@dataclass(frozen=True)
class Case:
    engine: str = "plain"
    world_size: int = 1
    accumulation: int = 1
    clip: float = 0.0
    dtype: torch.dtype = torch.float32
    persist: int = 100_000
    options: tuple[str, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    settings: AdaLoraConfig = SETTINGS

    def __str__(self) -> str:
        parts = [self.engine, f"x{self.world_size}", f"acc{self.accumulation}", f"clip{self.clip:g}", *self.options]
        if self.engine == "zero3":
            parts.append(f"persist{self.persist}")
        return "-".join([*parts, *(f"{k}{v}" for k, v in self.sizes)])


def run(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """One whole run; what this rank saw."""
    model: Any = adapted_net(case.settings, **dict(case.sizes))
    unused = model.blocks[1] if "unused_once" in case.options else None
    if "packed" in case.options:
        assert pack_adapters(model, case.settings) == 8
    if case.engine in ("fsdp2", "hsdp"):
        shape = (2, world_size // 2) if case.engine == "hsdp" else (world_size,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        kwargs: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": "no_reshard" not in case.options}
        if case.dtype != torch.float32:
            kwargs["mp_policy"] = MixedPrecisionPolicy(param_dtype=case.dtype, reduce_dtype=torch.float32)
        if "offload" in case.options:
            kwargs["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        for block in model.blocks:
            fully_shard(block, **kwargs)
        fully_shard(model, **kwargs)
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if "two_groups" in case.options:
        trainable = groups[0]["params"]
        groups = [{"params": trainable[::2]}, {"params": trainable[1::2], "weight_decay": 0.01}]
    optimizer = torch.optim.AdamW(groups, lr=2e-2, weight_decay=0.01, fused="fused" in case.options)
    hooks = attach(model, optimizer, case.settings, STEPS)
    allocator = hooks.method_step
    engine = None
    if case.engine == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=unused is not None)
    elif case.engine.startswith("zero"):
        engine = zero_engine(case, GLOBAL_BATCH, model, optimizer)
        model = engine
    losses = []
    for step in range(STEPS):
        x, y = (t.chunk(world_size)[rank] for t in global_batch(step, GLOBAL_BATCH, dict(case.sizes).get("d", 7)))
        if unused is not None:
            unused.skip = step in (3, 11)
        total = torch.zeros(())
        for micro in range(case.accumulation):
            micro_x, micro_y = (t.chunk(case.accumulation)[micro] for t in (x, y))
            if engine is not None and case.dtype != torch.float32:
                micro_x = micro_x.to(case.dtype)
            last = micro + 1 == case.accumulation
            if case.engine in ("fsdp2", "hsdp"):
                model.set_requires_gradient_sync(last)
            if case.engine == "ddp":
                model.require_backward_grad_sync = last
            loss = (model(micro_x).float() - micro_y).square().mean()
            total += loss.detach() / case.accumulation
            if engine is not None:
                engine.backward(loss)
                engine.step()
            else:
                (loss / case.accumulation).backward()
        if engine is None:
            if case.clip:
                torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], case.clip)
            optimizer.step()
            optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(total.item() / world_size)
    hooks.finish()
    lam = hooks.engine.full(list(allocator.parameters()).index(LAMBDAS_NAME))
    return {
        "losses": losses,
        "patterns": {a.step: a.keep.tolist() for a in allocator.allocations},
        "lam": lam.tolist(),
        "engine": type(hooks.engine).__name__,
        "firings": hooks.engine.num_firings,
        "spans": [tuple(s) for s in allocator.bound.spans],
        "state_bytes": sum(
            t.numel() * t.element_size() for t in (allocator.bound.sensitivity, allocator.bound.uncertainty)
        ),
        "num_elements": sum(f.numel for f in allocator.bound.layout.factors),
    }


@lru_cache
def control(accumulation: int, clip: float, options: tuple[str, ...], sizes, settings) -> dict[str, Any]:
    options = tuple(o for o in options if o in ("two_groups", "unused_once"))
    return run_ranks(1, run, Case("plain", 1, accumulation, clip, options=options, sizes=sizes, settings=settings))[0]


def check(case: Case) -> list[dict[str, Any]]:
    expected = control(case.accumulation, case.clip, case.options, case.sizes, case.settings)
    ranks = run_ranks(case.world_size, run, case)
    for result in ranks:
        assert result["patterns"] == expected["patterns"]
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(expected["losses"]), rtol=1e-5, atol=0)
        lam = torch.tensor(result["lam"])
        assert torch.equal(lam == 0, torch.tensor(expected["lam"]) == 0)
        assert [bool(v) for v in lam] == list(expected["patterns"].values())[-1]
        # I-bar and U-bar, 8 bytes per element of this rank's shard; shards differ by at most one row or chunk.
        shards = 1 if case.engine in ("plain", "ddp") else case.world_size // (2 if case.engine == "hsdp" else 1)
        assert sum(r["state_bytes"] for r in ranks) == 8 * result["num_elements"] * case.world_size // shards
    return ranks


def test_the_control_is_worth_comparing_with():
    result = control(1, 0.0, (), (), SETTINGS)
    patterns = list(result["patterns"].values())
    assert len(patterns) == 9 and len({tuple(p) for p in patterns}) >= 5
    assert sum(patterns[-1]) == 6 and result["losses"][-1] < 0.8 * result["losses"][0]


# Little smoothing and long intervals: a pruned triplet's lambda, vectors and moments live on, and one comes back.
RETURNING = SETTINGS.model_copy(update={"beta1": 0.3, "beta2": 0.3, "mask_interval_steps": 5})


@pytest.mark.parametrize(("engine", "world_size"), [("ddp", 2), ("fsdp2", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)])
def test_a_pruned_triplet_comes_back_on_every_engine(engine, world_size):
    [result, _] = check(Case(engine, world_size, settings=RETURNING))
    patterns = [torch.tensor(p) for p in result["patterns"].values()]
    assert any((later & ~earlier).any() for earlier, later in zip(patterns, patterns[1:], strict=False))


ENGINES = [
    ("ddp", 2, "PlainEngine"),
    ("fsdp2", 2, "Fsdp2Engine"),
    ("fsdp2", 3, "Fsdp2Engine"),
    ("hsdp", 4, "Fsdp2Engine"),
    ("zero1", 2, "ZeroEngine"),
    ("zero2", 2, "ZeroEngine"),
    ("zero3", 2, "ZeroEngine"),
    ("zero3", 3, "ZeroEngine"),
]


def _every_way_to_accumulate_and_clip():
    """All four on two ranks; on more, that of both together, and the rest in the slow tier."""
    for engine, world_size, name in ENGINES:
        for accumulation, clip in ((1, 0.0), (4, 0.05), (4, 0.0), (1, 0.05)):
            extra = world_size > 2 and (accumulation, clip) != (4, 0.05)
            yield pytest.param(engine, world_size, name, accumulation, clip, marks=pytest.mark.slow if extra else ())


@pytest.mark.parametrize(
    ("engine", "world_size", "name", "accumulation", "clip"), list(_every_way_to_accumulate_and_clip())
)
def test_same_patterns_and_losses_as_one_process(engine, world_size, name, accumulation, clip):
    for result in check(Case(engine, world_size, accumulation, clip)):
        assert result["engine"] == name


UNEVEN = (("d", 5), ("hidden", 11))


PACKED = [
    Case("plain", 1, options=("packed",)),
    Case("fsdp2", 2, 4, 0.05, options=("packed",)),
    Case("fsdp2", 3, options=("packed", "no_reshard", "fused"), sizes=UNEVEN),
    Case("zero3", 3, persist=0, options=("packed",), sizes=UNEVEN),
    Case("zero3", 2, persist=0, options=("packed", "unused_once")),
]
MORE_PACKED = [
    Case("hsdp", 4, options=("packed",)),
    Case("fsdp2", 2, options=("packed", "offload")),
    Case("fsdp2", 2, options=("packed", "unused_once")),
    Case("zero3", 2, 4, 0.05, options=("packed",)),
    Case("zero3", 2, persist=0, options=("packed", "sub_groups")),
    Case("zero3", 2, persist=0, options=("packed", "offload")),
    Case("zero2", 2, options=("packed",)),
    Case("ddp", 2, options=("packed",)),
]
PACKED += [pytest.param(case, marks=pytest.mark.slow) for case in MORE_PACKED]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_parameters_are_those_of_their_parts(case):
    for result in check(case):
        assert result["engine"] == "PackedEngine"


MATCHED = SETTINGS.model_copy(update={"start": "matched", "init": None})
SPECIAL = [
    Case("zero3", 2, persist=0),
    Case("zero3", 3, persist=0, sizes=UNEVEN),
    Case("zero3", 2, persist=0, options=("sub_groups",)),
    pytest.param(Case("zero3", 2, options=("two_groups",)), marks=pytest.mark.slow),
    Case("zero2", 2, options=("two_groups",)),
    Case("zero1", 3, options=("two_groups",), sizes=UNEVEN),
    Case("fsdp2", 2, options=("two_groups", "no_reshard")),
    Case("fsdp2", 2, options=("offload",)),
    Case("zero2", 2, options=("offload",)),
    Case("zero3", 2, options=("offload",)),
    Case("fsdp2", 4, sizes=(("d", 3), ("hidden", 5))),  # more ranks than r and than d: empty spans
    Case("zero2", 4, sizes=UNEVEN),
    Case("ddp", 2, options=("fused",)),
    Case("fsdp2", 3, options=("fused", "two_groups"), sizes=UNEVEN),
    pytest.param(Case("zero3", 2, options=("fused",)), marks=pytest.mark.slow),
    Case("ddp", 2, options=("unused_once",)),
    Case("fsdp2", 2, options=("unused_once",)),
    Case("zero1", 2, options=("unused_once",)),
    Case("zero3", 2, options=("unused_once",)),
    Case("fsdp2", 2, settings=SETTINGS.model_copy(update={"orthogonality_form": "squared", "orthogonality": 0.01})),
    Case("zero3", 3, settings=SETTINGS.model_copy(update={"importance_order": "after"})),
    Case("zero2", 2, settings=SETTINGS.model_copy(update={"importance": "magnitude", "init_rank": 4})),
    Case("fsdp2", 3, settings=SETTINGS.model_copy(update={"orthogonality": 0.0, "budget_scope": "local"})),
    *(Case(engine, 2, settings=MATCHED) for engine in ("ddp", "fsdp2", "zero1", "zero2")),
    Case("zero3", 2, persist=0, settings=MATCHED),
    Case("fsdp2", 3, settings=MATCHED, sizes=UNEVEN),
]


@pytest.mark.parametrize("case", SPECIAL, ids=str)
def test_uneven_empty_offloaded_and_unused(case):
    ranks = check(case)
    if case.engine == "fsdp2" and case.world_size == 4:
        assert any(start == stop for r in ranks for start, stop in r["spans"])
    if "sub_groups" in case.options or "two_groups" in case.options and case.engine.startswith("zero"):
        assert all(r["firings"] > 1 for r in ranks)


@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero2", "zero3"])
def test_importance_state_is_sharded(engine):
    """Per rank at most 1.02 x 8 bytes x adapter elements / ranks."""
    settings = SETTINGS.model_copy(update={"init_rank": 4, "target_rank": 2.0})
    for result in check(Case(engine, 2, sizes=(("d", 64), ("hidden", 96)), settings=settings)):
        assert result["state_bytes"] <= 1.02 * 8 * result["num_elements"] / 2


STATED_BF16_DIFFERENCE = 0  # of 12 triplets, as docs/sharding.md says
BF16 = [Case("fsdp2", 2, dtype=torch.bfloat16), *(Case(f"zero{s}", 2, dtype=torch.bfloat16) for s in (1, 2, 3))]


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16_meets_the_budget_exactly(case):
    """Low precision moves scores, so patterns may differ from float32's; never between ranks, and never in size."""
    expected = control(1, 0.0, (), (), SETTINGS)
    ranks = run_ranks(case.world_size, run, case)
    assert all(r["patterns"] == ranks[0]["patterns"] for r in ranks)
    assert {s: sum(p) for s, p in ranks[0]["patterns"].items()} == {s: sum(p) for s, p in expected["patterns"].items()}
    assert sum(v != 0 for v in ranks[0]["lam"]) == 6
    last = max(expected["patterns"])
    differing = sum(a != b for a, b in zip(ranks[0]["patterns"][last], expected["patterns"][last], strict=True))
    assert differing <= STATED_BF16_DIFFERENCE


class Collectives(TorchDispatchMode):
    """Records every c10d operation and its payload in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.calls.append((func.__name__.partition(".")[0], sum(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))


def count_communication(rank: int, world_size: int, engine: str, with_allocator: bool) -> dict[str, Any]:
    model: Any = adapted_net(SETTINGS)
    if engine == "fsdp2":
        fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    hooks = attach(model, optimizer, SETTINGS, STEPS) if with_allocator else None
    if engine == "ddp":
        model = DistributedDataParallel(model)
    elif engine == "zero3":
        settings = {
            "train_micro_batch_size_per_gpu": 24,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        }
        model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    steps = []
    for step in range(12):
        x, y = (t.chunk(world_size)[rank] for t in global_batch(step, GLOBAL_BATCH))
        with Collectives() as collectives:
            loss = (model(x) - y).square().mean()
            backward_and_step(engine, model, optimizer, loss)
        steps.append(collectives.calls)
    result = {"steps": steps}
    if hooks is not None:
        hooks.detach()
        allocator = hooks.method_step
        result["allocating"] = [a.step for a in allocator.allocations]
        result["bytes"] = hooks.bytes_per_step, allocator.bytes_per_allocation
    return result


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_communication_beyond_lora_is_the_stated_two_reductions(engine):
    plain = run_ranks(2, count_communication, engine, False)[0]["steps"]
    ours = run_ranks(2, count_communication, engine, True)[0]
    triplets = 4 * SETTINGS.init_rank
    per_step, per_allocation = ours["bytes"]
    assert per_allocation == 8 * (triplets + 6)
    if engine == "ddp":
        assert per_step == 0
    if engine == "fsdp2":  # whole rows only: eight Gram matrices of 3 x 3, and the non-finite count
        assert per_step == 4 * (8 * 9 + 1)
    assert len(ours["allocating"]) >= 2
    for step in range(3, 12):  # the first steps also set things up
        expected = sorted(plain[step] + [("allreduce_", per_step)] * (per_step > 0))
        if step in ours["allocating"]:
            expected = sorted([*expected, ("allreduce_", per_allocation)])
        assert sorted(ours["steps"][step]) == expected, f"step {step}"


def diverge(rank: int, world_size: int) -> str:
    model = adapted_net(SETTINGS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    hooks = attach(model, optimizer, SETTINGS, STEPS)
    allocator = hooks.method_step
    wrapped = DistributedDataParallel(model)
    try:
        for step in range(STEPS):
            x, y = (t.chunk(world_size)[rank] for t in global_batch(step, GLOBAL_BATCH))
            (wrapped(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if rank == 1 and len(allocator.allocations) == 3:
                allocator.keep = allocator.keep.roll(1)
    except RuntimeError as error:
        hooks.detach()
        return str(error)
    return "no error"


def test_patterns_that_diverge_stop_every_rank():
    for message in run_ranks(2, diverge):
        assert "rank patterns differ between ranks" in message
