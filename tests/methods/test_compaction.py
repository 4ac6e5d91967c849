"""Compaction changes nothing but memory and time: every engine, against the masked run of the same settings."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from adalora_dist.config.methods import AdaLoraConfig
from adalora_dist.methods.hooks import MethodHooks, attach
from adalora_dist.methods.packing import pack_adapters
from tests.support import quantized_runs
from tests.support.engine_steps import zero_engine
from tests.support.models import adapted_net, config, global_batch
from tests.support.ranks import import_deepspeed, run_ranks

import_deepspeed()  # or skip

FROZEN = 40  # steps after the freeze
STEPS = 20 + FROZEN
GLOBAL_BATCH = 48
# Four matrices of rank 5, budget 7: one loses its branch, others keep odd ranks.
SETTINGS = config(init_rank=5, target_budget=7, initial_warmup_steps=4, final_steps=FROZEN, mask_interval_steps=3)


@dataclass(frozen=True)
class Case:
    engine: str
    world_size: int = 1
    accumulation: int = 1
    clip: float = 0.02  # far below the gradients' norm: whatever else entered the norm would show
    dtype: torch.dtype = torch.float32
    persist: int = 100_000
    options: tuple[str, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    settings: AdaLoraConfig = SETTINGS
    compact: bool = True

    def __str__(self) -> str:
        parts = [self.engine, f"x{self.world_size}", f"acc{self.accumulation}", f"clip{self.clip:g}"]
        return "-".join([*parts, *self.options])


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, whoever keeps them."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
    tensors = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}.values())


def num_local(hooks: MethodHooks) -> int:
    """Adapter elements whose moments are on this rank."""
    return sum(span.stop - span.start for span in hooks.engine.spans())


def run(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """One whole run with weight decay; what this rank saw."""
    model: Any = adapted_net(case.settings, **dict(case.sizes))
    model.head.requires_grad_("head" in case.options)  # trained, but no adapter
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
            if "every_layer" in case.options:  # a group of its own, which loses all its parameters
                for layer in (block.up, block.down):
                    fully_shard(layer.base, **kwargs)
                    fully_shard(layer, **kwargs)
            fully_shard(block, **kwargs)
        fully_shard(model, **kwargs)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=8e-3, weight_decay=0.1)
    hooks = attach(model, optimizer, case.settings, STEPS)
    allocator = hooks.method_step
    if case.engine == "ddp":
        model = DistributedDataParallel(model, gradient_as_bucket_view="views" in case.options)
    elif case.engine.startswith("zero"):
        model, optimizer = zero_engine(case, GLOBAL_BATCH, model, optimizer), None
    losses = []
    for step in range(STEPS):
        x, y = (t.chunk(world_size)[rank] for t in global_batch(step, GLOBAL_BATCH, dict(case.sizes).get("d", 7)))
        total = torch.zeros(())
        for micro in range(case.accumulation):
            micro_x, micro_y = (t.chunk(case.accumulation)[micro] for t in (x, y))
            if optimizer is None and case.dtype != torch.float32:
                micro_x = micro_x.to(case.dtype)
            last = micro + 1 == case.accumulation
            if case.engine in ("fsdp2", "hsdp"):
                model.set_requires_gradient_sync(last)
            if case.engine == "ddp":
                model.require_backward_grad_sync = last
            loss = (model(micro_x).float() - micro_y).square().mean()
            total += loss.detach() / case.accumulation
            if optimizer is None:
                model.backward(loss)
                model.step()
            else:
                (loss / case.accumulation).backward()
        if optimizer is not None:
            if case.clip:
                torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], case.clip)
            optimizer.step()
            optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(total.item() / world_size)
        if case.compact:
            at_freeze = step == allocator.schedule.freeze_step
            if at_freeze:
                before = live_bytes(), num_local(hooks)
                if "evaluated" in case.options:  # FSDP2 leaves parameters gathered that it does not reshard by itself
                    with torch.no_grad():
                        model(global_batch(step, 4, dict(case.sizes).get("d", 7))[0])
            assert allocator.compact(hooks, model, optimizer) == at_freeze
    after = live_bytes(), num_local(hooks)
    hooks.finish()
    return {
        "losses": losses,
        "patterns": {a.step: a.keep.tolist() for a in allocator.allocations},
        "ranks": list(allocator.rank_pattern().values()),
        "held": [m.triplets for m in allocator.layers],
        "adapters": hooks.updates(),
        "memory": (before, after) if case.compact else None,
    }


def check(case: Case) -> None:
    compacted = run_ranks(case.world_size, run, case)
    [masked, *_] = run_ranks(case.world_size, run, replace(case, compact=False))
    assert sum(masked["ranks"]) == 7 and 0 in masked["ranks"] and {1, 3, 5} & set(masked["ranks"])
    assert sum(masked["losses"][-10:]) < sum(masked["losses"][-FROZEN : 10 - FROZEN])  # the frozen phase learns
    for result in compacted:
        assert result["patterns"] == masked["patterns"] and result["ranks"] == masked["ranks"]
        assert [len(held) for held in result["held"]] == result["ranks"]
        losses, expected = torch.tensor(result["losses"]), torch.tensor(masked["losses"])
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
        for own, other in zip(result["adapters"], masked["adapters"], strict=True):
            assert own.name == other.name and own.scale == other.scale
            torch.testing.assert_close(own.delta(), other.delta(), rtol=1e-4, atol=1e-6)


EVERY = [Case("plain"), Case("fsdp2", 2, options=("no_reshard", "evaluated")), Case("zero3", 2)]
EVERY += [
    Case("fsdp2", 2, options=("packed", "no_reshard", "evaluated")),
    Case("zero3", 2, persist=0, options=("packed", "evaluated")),
]
MORE = [
    Case("fsdp2", 2),
    Case("ddp", 2, accumulation=2),
    Case("zero1", 2, options=("head",)),
    Case("zero2", 2, accumulation=2),
    Case("plain", clip=0, accumulation=3, options=("head",)),
    Case("ddp", 3, options=("head", "views")),
    Case("fsdp2", 3, accumulation=2, options=("every_layer", "head")),
    Case("fsdp2", 2, options=("offload", "no_reshard")),
    Case("zero3", 2, persist=0, options=("evaluated",)),
    Case("hsdp", 4, options=("no_reshard",)),
    Case("zero1", 3),
    Case("zero1", 2, options=("offload",)),
    Case("zero2", 3, options=("head",)),
    Case("zero2", 2, options=("offload",)),
    Case("zero3", 3, persist=0, options=("head",)),
    Case("zero3", 2, accumulation=2, options=("sub_groups",)),
    Case("zero3", 2, persist=0, options=("offload",)),
    Case("fsdp2", 3, accumulation=2, options=("packed", "head", "every_layer")),
    Case("hsdp", 4, options=("packed",)),
    Case("fsdp2", 2, options=("packed", "offload")),
    Case("zero3", 3, accumulation=2, options=("packed", "head")),
    Case("zero3", 2, persist=0, options=("packed", "sub_groups")),
    Case("zero3", 2, persist=0, options=("packed", "offload")),
    Case("plain", options=("packed", "head")),
]


@pytest.mark.parametrize("case", [*EVERY, *(pytest.param(c, marks=pytest.mark.slow) for c in MORE)], ids=str)
def test_losses_after_compaction_are_those_of_the_masked_run(case):
    check(case)


@pytest.mark.parametrize(
    "engine",
    [
        "plain",
        "zero2",
        *(pytest.param(engine, marks=pytest.mark.slow) for engine in ("ddp", "fsdp2", "zero1", "zero3")),
    ],
)
def test_memory_falls_to_the_final_budget(engine):
    """Weights, moments (4 and 8 bytes per local element), the step's flat buffers (8); Ī and Ū (8) go altogether."""
    sizes = (("d", 64), ("hidden", 96))
    world_size = 1 if engine == "plain" else 2
    for result in run_ranks(world_size, run, Case(engine, world_size, sizes=sizes)):
        (bytes_before, num_before), (bytes_after, num_after) = result["memory"]
        assert 0 < num_after < 0.5 * num_before
        assert bytes_before - bytes_after > 0.97 * (28 * num_before - 20 * num_after)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [Case("fsdp2", 2, dtype=torch.bfloat16), *(Case(f"zero{s}", 2, dtype=torch.bfloat16) for s in (1, 2, 3))],
    ids=str,
)  # fmt: skip
def test_bf16_goes_on_as_the_masked_run_does(case):
    compacted, masked = (run_ranks(2, run, replace(case, compact=c))[0] for c in (True, False))
    assert compacted["patterns"] == masked["patterns"] and sum(compacted["ranks"]) == 7
    torch.testing.assert_close(compacted["losses"], masked["losses"], rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(e, marks=pytest.mark.slow) for e in ("ddp", "zero2", "zero3"))]
)
@pytest.mark.parametrize("method", ["none", pytest.param("nf4", marks=pytest.mark.slow)])
def test_the_loop_compacts_under_accelerate(engine, method, tmp_path):
    """Evaluation, export and memory of a run whose engine was rebuilt behind accelerate's wrappers."""
    folder = quantized_runs.write_llama(tmp_path / "llama")
    runs = {}
    for switch in (True, False):
        recomputes = engine == "zero3"  # whose gathered parameters come and go between forward and recomputation
        case = quantized_runs.Case(
            engine, method, evaluate_first=True, gradient_checkpointing=recomputes, compact=switch
        )
        runs[switch] = run_ranks(2, quantized_runs.run, case, folder)
    for compacted, masked in zip(runs[True], runs[False], strict=True):
        assert compacted.engine == engine and compacted.patterns == masked.patterns
        torch.testing.assert_close(compacted.losses, masked.losses, rtol=1e-6, atol=0)
        torch.testing.assert_close(compacted.logits, masked.logits, rtol=1e-4, atol=1e-5)
        for own, other in zip(compacted.adapters, masked.adapters, strict=True):
            torch.testing.assert_close(own.delta(), other.delta(), rtol=1e-4, atol=1e-6)
        held, before = compacted.held, masked.held
        assert held["linear_bytes"] == before["linear_bytes"] and held["other_bytes"] == before["other_bytes"]
        assert held["adapter_bytes"] < 0.7 * before["adapter_bytes"]  # half the triplets, of unequal matrices
        assert held["optimizer_bytes"] < 0.7 * before["optimizer_bytes"]
        assert held["importance_bytes"] == 0 < before["importance_bytes"]
