"""Compaction changes nothing but memory and time: every engine, against the masked run of the same settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import import_deepspeed, run_ranks
from models import adapted_net, config, global_batch
from torch.nn.parallel import DistributedDataParallel

from adalora_dist.allocator import RankAllocator
from adalora_dist.compaction import compact
from adalora_dist.config import AdapterConfig
from adalora_dist.export import gather_adapters

deepspeed = import_deepspeed()

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
    settings: AdapterConfig = SETTINGS
    compact: bool = True

    def __str__(self) -> str:
        parts = [self.engine, f"x{self.world_size}", f"acc{self.accumulation}", f"clip{self.clip:g}"]
        return "-".join([*parts, *self.options])


def run(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    """One whole run with weight decay; what this rank saw."""
    model: Any = adapted_net(case.settings)
    model.head.requires_grad_("head" in case.options)  # trained, but no adapter
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.1)
    allocator = RankAllocator.attach(model, optimizer, case.settings, STEPS)
    if case.engine == "ddp":
        model = DistributedDataParallel(model, gradient_as_bucket_view="views" in case.options)
    losses = []
    for step in range(STEPS):
        x, y = (t.chunk(world_size)[rank] for t in global_batch(step, GLOBAL_BATCH))
        total = torch.zeros(())
        for micro in range(case.accumulation):
            micro_x, micro_y = (t.chunk(case.accumulation)[micro] for t in (x, y))
            last = micro + 1 == case.accumulation
            if case.engine == "ddp":
                model.require_backward_grad_sync = last
            loss = (model(micro_x).float() - micro_y).square().mean()
            total += loss.detach() / case.accumulation
            (loss / case.accumulation).backward()
        if case.clip:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], case.clip)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(total.item() / world_size)
        if case.compact:
            assert compact(allocator, model, optimizer) == (step == allocator.schedule.freeze_step)
    allocator.finish()
    return {
        "losses": losses,
        "patterns": {a.step: a.keep.tolist() for a in allocator.allocations},
        "ranks": list(allocator.rank_pattern().values()),
        "held": [m.layer.triplets for m in allocator.matrices],
        "adapters": gather_adapters(allocator),
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


@pytest.mark.parametrize(
    "case",
    [
        Case("plain"),
        Case("plain", clip=0, accumulation=3, options=("head",)),
        Case("ddp", 2, accumulation=2),
        Case("ddp", 3, options=("head", "views")),
    ],
    ids=str,
)
def test_losses_after_compaction_are_those_of_the_masked_run(case):
    check(case)
