"""What adaptive rank costs in time: ratios between methods that take turns in one process.

    python benchmarks/speed.py ops            operations, collectives and host reads of a step, exactly; two minutes
    python benchmarks/speed.py update         the importance update beside PEFT's, at 2 and 7.5 million elements
    python benchmarks/speed.py step           one training step of the four methods at the same ranks
    python benchmarks/speed.py run            a whole run with the proportions of the paper's MNLI schedule
    python benchmarks/speed.py gpu            LLaMA-7B and -8B, DeBERTa and BART on one CUDA device of 80 GB or more

CPU times are thread CPU times of one core (``time.thread_time``), so that other processes disturb as little as
possible; GPU times are device events. Every figure is a median over rounds in which all methods take their turn. Dated
results lie beside this file. ``pip install -e '.[dev]'`` has PEFT.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn
from variants import NAMES, TARGETS, Variant, llama

MNLI_STEPS, MNLI_INITIAL, MNLI_FINAL = 85_970, 8_000, 50_000  # 7 epochs of 393,000 rows in batches of 32; t_i; t_f


def take_turns(actions: dict[str, Callable[[], None]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Thread CPU seconds of each action, once per round."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for round_ in range(-warmup, rounds):
        for name, action in actions.items():
            started = time.thread_time()
            action()
            if round_ >= 0:
                seconds[name].append(time.thread_time() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], a: str, b: str) -> float:
    """Median over rounds of a / b within the round: what slows a whole round down cancels out."""
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))


# ------------------------------------------------------------------------------------------------------ operations


def _count_rank(rank: int, world_size: int, engine: str, method: str, folder: str) -> None:
    from operations import count_run

    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/{engine}-{method}.rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    kind, _, unpacked = engine.partition("-")
    steps = count_run(rank, world_size, kind, method, packs=not unpacked)
    if rank == 0:
        Path(folder, f"{engine}-{method}.json").write_text(json.dumps(steps))
    dist.destroy_process_group()


def ops() -> None:
    from operations import extra, of_engine

    print("| over the same LoRA | forward and backward | step | step with a selection | step when frozen | at most "
          "| host reads per step / with a selection | collectives per step / with a selection "
          "| over one process, a matrix: AdaLoRA / LoRA |")  # fmt: skip
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = [("single", 1, "", "one process"), ("ddp", 2, "", "DDP x 2")]
    rows += [("fsdp2", 2, "", "FSDP2 x 2"), ("fsdp2-unpacked", 2, "", "FSDP2 x 2, not packed")]
    rows += [("zero3", 2, "", "ZeRO-3 x 2"), ("zero3-unpacked", 2, "", "ZeRO-3 x 2, not packed")]
    rows += [("single", 1, "peft-", "PEFT, one process")]
    alone: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for engine, world_size, prefix, name in rows:
            runs = []
            for method in ("adalora", "lora"):
                spawn(_count_rank, (world_size, engine, prefix + method, folder), nprocs=world_size)
                runs.append(json.loads(Path(folder, f"{engine}-{prefix}{method}.json").read_text()))
            ours, lora = runs
            forward, step = (extra(ours, lora, part, "ops") for part in ("forward", "step"))
            reads, collectives = (
                [a + b for a, b in zip(*(extra(ours, lora, part, key) for part in ("forward", "step")), strict=True)]
                for key in ("host_reads", "collectives")
            )
            cells: list[Any] = [max(forward[2:]), step[2], max(step[3:5]), step[5]]
            cells.append(max(a + b for a, b in zip(forward[2:], step[2:], strict=True)))
            cells += [f"{reads[2]} / {max(reads[3:5])}", f"{collectives[2]} / {max(collectives[3:5])}"]
            alone = alone or runs
            cells.append(" / ".join(f"{of_engine(own, one):.1f}" for own, one in zip(runs, alone, strict=True)))
            print(f"| {name} | " + " | ".join(f"{c:,}" if isinstance(c, int) else c for c in cells) + " |", flush=True)


# -------------------------------------------------------------------------------------------------------- the update


class Shapes(nn.Module):
    """Linear maps of a model's shapes whose weights take no memory: for what does not run a forward."""

    def __init__(self, shapes: dict[str, tuple[int, int]], num_layers: int) -> None:
        super().__init__()
        layers = [nn.ModuleDict() for _ in range(num_layers)]
        self.layers = nn.ModuleList(layers)
        for layer in layers:
            for name, (d_out, d_in) in shapes.items():
                layer[name] = linear = nn.Linear(d_in, d_out, bias=False, device="meta")
                linear.weight = nn.Parameter(torch.zeros(1).expand(d_out, d_in), requires_grad=False)


DEBERTA = {k: (768, 768) for k in ("q", "k", "v", "o")} | {"up": (3072, 768), "down": (768, 3072)}
LLAMA_7B = {k: (4096, 4096) for k in ("q", "k", "v", "o")} | {"gate": (11008, 4096), "up": (11008, 4096)}
LLAMA_7B |= {"down": (4096, 11008)}


def update(rounds: int = 15) -> None:
    print("| r = 12 | adapter elements | kernel | importance update / PEFT's | values copied, too | whole hook, "
          "regulariser included |\n| --- | ---: | --- | ---: | ---: | ---: |")  # fmt: skip
    for name, shapes, num_layers in (("DeBERTa-base", DEBERTA, 12), ("8 layers of LLaMA-7B", LLAMA_7B, 8)):
        for row in compare_updates(shapes, num_layers, rounds):
            print(f"| {name} | {row} |", flush=True)


def compare_updates(shapes: dict[str, tuple[int, int]], num_layers: int, rounds: int) -> list[str]:
    """A row per kernel: medians of ratios to PEFT's update of the same averages."""

    def variant(method: str, **changes: Any) -> Variant:
        made = Variant(method, Shapes(shapes, num_layers), 12, 8, (1000, 10, 10, 10), targets=tuple(shapes), **changes)
        for p in made.trainable:
            p.grad = torch.ones_like(p)  # values, multiplied by it again and again, keep their size
        return made

    theirs = variant("peft-adalora")
    actions = {"peft": lambda: theirs.model.base_model.rankallocator.update_ipt(theirs.model)}
    kernels = ("eager", "compiled")
    for kernel in kernels:
        ours = variant("adalora", importance_kernel=kernel)
        ours.optimizer.step()  # binds
        actions |= _parts_of_the_hook(ours, kernel)
    seconds = take_turns(actions, rounds)
    num_elements = f"{ours.hooks.method_step.bound.sensitivity.numel() / 1e6:.1f} M"
    rows = []
    for kernel in kernels:
        ratios = [f"{ratio(seconds, f'{part}, {kernel}', 'peft'):.2f}" for part in ("update", "alone", "hook")]
        rows.append(" | ".join([num_elements, kernel, *ratios]))
    return rows


def _parts_of_the_hook(variant: Variant, kernel: str) -> dict[str, Callable[[], None]]:
    hooks, optimizer = variant.hooks, variant.optimizer
    bound = hooks.method_step.bound

    @torch.no_grad()
    def update() -> None:  # what the hook does for importance: multiply values by gradients, advance the averages
        bound.take_in(hooks.engine.gradients(), regularised=False, measures=True, is_last=True)

    @torch.no_grad()
    def alone() -> None:  # with the copy of the values that the regulariser has made otherwise
        bound.collect_values()
        update()

    return {
        f"update, {kernel}": update,
        f"alone, {kernel}": alone,
        f"hook, {kernel}": lambda: hooks.before_firing(optimizer),
    }


# ------------------------------------------------------------------------------------------------------ steps and runs

FEW_WIDE = dict(hidden=768, mlp=2048, num_layers=4, num_heads=12, vocabulary=1000)
MANY_NARROW = dict(hidden=256, mlp=688, num_layers=32, num_heads=4, vocabulary=1000)  # LLaMA-7B's 224 matrices
SIZES: dict[str, dict[str, int]] = {"4 x 768": FEW_WIDE, "32 x 256": MANY_NARROW}


def step(rounds: int = 12) -> None:
    schedule = (100_000, 1, 1, 10)  # far from its end: selections are made, and take one triplet of 224
    print(f"LLaMA shapes, {len(TARGETS)} matrices a layer, rank 8, float32\n")
    print("| layers x width | tokens a step | | seconds | step / our LoRA's | / PEFT AdaLoRA's | / PEFT LoRA's |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for sizes in (FEW_WIDE, MANY_NARROW):
        variants = {m: Variant(m, llama(**sizes), 8, 7, schedule) for m in NAMES}
        for tokens in (64, 128, 512):
            batch = torch.randint(1000, (tokens // 64, 64), generator=torch.Generator().manual_seed(0))
            actions: dict[str, Callable[[], None]] = {m: partial(v.step, batch) for m, v in variants.items()}
            seconds = take_turns(actions, rounds)
            for method, name in NAMES.items():
                others = [f"{ratio(seconds, method, other):.3f}" for other in ("lora", "peft-adalora", "peft-lora")]
                shape = f"{sizes['num_layers']} x {sizes['hidden']}"
                cells = [shape, str(tokens), name, f"{statistics.median(seconds[method]):.3f}", *others]
                print(f"| {' | '.join(cells)} |", flush=True)


def run(sizes: Sequence[str], tokens: Sequence[int], rounds: int, num_steps: int = 60) -> None:
    """AdaLoRA 12 -> 8, compacted at the freeze, and LoRA at 8, step by step in turns; seconds add up over a run."""
    schedule = (num_steps, round(num_steps * MNLI_INITIAL / MNLI_STEPS), round(num_steps * MNLI_FINAL / MNLI_STEPS), 1)
    frozen = num_steps - schedule[2] + 1
    print(
        f"{num_steps} steps, t_i {schedule[1]}, t_f {schedule[2]}, a selection at every step; AdaLoRA 12 -> 8, LoRA 8; "
        f"medians of {rounds} runs in turns, least and greatest\n"
    )
    parts = {
        "whole run": slice(1, None),
        "until frozen, and compaction": slice(1, frozen),
        "frozen": slice(frozen, None),
    }
    print("| layers x width | tokens |", " | ".join(f"{part}, AdaLoRA / LoRA" for part in parts), "|")
    print("| --- | ---: |" + " ---: |" * len(parts))
    for name in sizes:
        for count in tokens:
            found = [_run_once(SIZES[name], count, schedule) for _ in range(rounds)]
            cells = []
            for part in parts.values():
                ratios = sorted(sum(seconds["ours"][part]) / sum(seconds["lora"][part]) for seconds in found)
                cells.append(f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")
            print(f"| {name} | {count} |", " | ".join(cells), "|", flush=True)


def _run_once(size: dict[str, int], tokens: int, schedule: tuple[int, int, int, int]) -> dict[str, list[float]]:
    ours = Variant("adalora", llama(**size), 12, 8, schedule, compacts=True)
    lora = Variant("lora", llama(**size), 8, 8, schedule)
    batch = torch.randint(1000, (-(-tokens // 64), min(tokens, 64)), generator=torch.Generator().manual_seed(0))
    seconds = take_turns({"ours": lambda: ours.step(batch), "lora": lambda: lora.step(batch)}, schedule[0], warmup=0)
    ours.hooks.finish()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=("ops", "update", "step", "run", "gpu"))
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["4 x 768"], help="of run")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512], help="of run, a step")
    parser.add_argument("--rounds", type=int, default=1, help="of run")
    arguments = parser.parse_args()
    benchmark = arguments.benchmark
    if benchmark == "gpu":
        from speed_gpu import gpu

        gpu()
        return
    torch.set_num_threads(1)
    benchmarks: dict[str, Callable[[], None]] = {
        "ops": ops,
        "update": update,
        "step": step,
        "run": partial(run, arguments.sizes, arguments.tokens, arguments.rounds),
    }
    benchmarks[benchmark]()


if __name__ == "__main__":
    main()
