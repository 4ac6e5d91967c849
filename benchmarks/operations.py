"""Operations, collectives and host reads of every training step, counted exactly. Any machine; no times.

    python benchmarks/speed.py ops        prints the table (one process, DDP and FSDP2 on two, and PEFT)

tests/methods/test_operations.py holds the counts to their limits. Counted are calls into torch's dispatcher, each a
kernel on a GPU, a few multi-tensor kernels (``_foreach_*``) or a mere view; views count, too.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from variants import Variant, llama

NUM_LAYERS, MATRICES_PER_LAYER = 32, 7  # LLaMA-7B: 224 matrices
NUM_STEPS, WARMUP_STEPS, FINAL_STEPS = 6, 2, 2  # step 2: no selection; 3, 4: one each; 5: frozen
RANK, TARGET = 4, 2
_HOST_OPS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal", "unique2"}
_HOST_METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class Counts(TorchDispatchMode):
    """What happens while this is entered: ATen operations by name, collectives, and reads by the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.aten: Counter[str] = Counter()
        self.collectives: Counter[str] = Counter()
        self.host_reads: Counter[str] = Counter()
        self.late_reads = 0
        """Of a host copy that was begun an allocation earlier (methods/adalora/digest.py): nothing waits for it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__.partition(".")[0]
        if func.namespace == "aten":
            self.aten[name] += 1
            if name in _HOST_OPS:
                self.host_reads[name] += 1
        elif func.namespace in ("c10d", "_c10d_functional"):
            self.collectives[name] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def with_host_reads(self) -> Iterator[Counts]:
        """Enter, and count what no dispatcher sees on a CPU: a tensor's values taken by Python."""
        originals = {name: getattr(torch.Tensor, name) for name in _HOST_METHODS}

        def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if sys._getframe(1).f_globals.get("__name__") == "adalora_dist.methods.adalora.digest":
                    self.late_reads += 1
                else:
                    self.host_reads[name] += 1
                return original(tensor, *args, **kwargs)

            return method

        try:
            for name, original in originals.items():
                setattr(torch.Tensor, name, counting(name, original))
            with self:
                yield self
        finally:
            for name, original in originals.items():
                setattr(torch.Tensor, name, original)


def count_run(
    rank: int,
    world_size: int,
    engine: str,
    method: str,
    num_layers: int = NUM_LAYERS,
    fused: bool = True,
    packs: bool = True,
) -> list[dict[str, Any]]:
    """A short run; per step the counts of "forward" (with backward) and "step", and whether it "allocates".

    Args:
        engine: single, ddp, fsdp2 or zero3; all but the first want the default process group.
        method: one of ``variants.NAMES``; PEFT's on a single process only.
        fused: AdamW's own kernel, which can leave out a step; otherwise the host tells it to.
        packs: under FSDP2 and ZeRO-3 a block's adapters are one parameter, as in a run.
    """
    model: Any = llama(16, 44, num_layers)
    schedule = (NUM_STEPS, WARMUP_STEPS, FINAL_STEPS, 1)
    variant = Variant(method, model, RANK, TARGET, schedule, fused, packs=packs and engine in ("fsdp2", "zero3"))
    if engine == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        groups = variant.optimizer.param_groups
        groups[0]["params"] = [p for p in model.parameters() if p.requires_grad]
    elif engine == "ddp":
        variant.model = DistributedDataParallel(model)
    elif engine == "zero3":
        variant.model = _under_zero3(model, variant.optimizer, rank)
    tokens = torch.arange(16).view(2, 8)
    steps = []
    for step in range(NUM_STEPS):
        forward, update = Counts(), Counts()
        with forward.with_host_reads() if rank == 0 else nullcontext():
            variant.forward_backward(tokens)
        with update.with_host_reads() if rank == 0 else nullcontext():
            variant.update()
        variant.optimizer.zero_grad()
        made = [a.step for a in getattr(variant.hooks.method_step, "allocations", ())] if variant.hooks else []
        steps.append({"forward": _numbers(forward), "step": _numbers(update), "allocates": step in made})
    if variant.hooks is not None:
        variant.hooks.finish()
    return steps


def _under_zero3(model: Any, optimizer: torch.optim.Optimizer, rank: int) -> Any:
    """Nothing stays gathered."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", str(rank))
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled for a minute
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def _numbers(counts: Counts) -> dict[str, Any]:
    return {
        "ops": counts.aten.total(),
        "names": dict(counts.aten),
        "collectives": counts.collectives.total(),
        "host_reads": counts.host_reads.total(),
        "late_reads": counts.late_reads,
    }


def extra(ours: list[dict[str, Any]], lora: list[dict[str, Any]], part: str, key: str) -> list[int]:
    """Per step, how much more of ``key`` one run has than the other."""
    return [a[part][key] - b[part][key] for a, b in zip(ours, lora, strict=True)]


def of_engine(sharded: list[dict[str, Any]], alone: list[dict[str, Any]]) -> float:
    """Operations of a step without a selection more than on one process, for each of ``NUM_LAYERS`` x 7 matrices."""
    more = sum(extra(sharded, alone, part, "ops")[2] for part in ("forward", "step"))
    return more / (NUM_LAYERS * MATRICES_PER_LAYER)
