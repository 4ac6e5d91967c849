"""Plans of LLaMA on clusters, by ``adalora-dist plan``'s own code. No GPU, no weights, no network; minutes on a CPU.

python benchmarks/plan.py llama_7b      prints benchmarks/plan_llama_7b.md; llama_8b and llama_70b, too
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from adalora_dist.tasks.commonsense.config import CommonsenseConfig
from adalora_dist.training.dry_run import plan_run
from adalora_dist.training.plan.cluster import Cluster
from adalora_dist.training.plan.plan import Planner
from adalora_dist.training.plan.text import size

MODELS = {"llama_7b": "llama-7b", "llama_8b": "Llama-3.1-8B", "llama_70b": "Llama-3.1-70B"}
WORLD_SIZES = (8, 16, 64, 256, 1024)
ENGINES = ("fsdp2", "zero3")
LENGTH = 2048


def configuration(name: str, world_size: int) -> CommonsenseConfig:
    """One sequence on each process."""
    return CommonsenseConfig.model_validate(
        {
            "model": {"name": MODELS[name], "dtype": "bfloat16"},
            "adapter": {"method": "adalora", "targets": ["all-linear"], "init_rank": 12, "target_rank": 8},
            "train": {
                "batch_size": world_size, "micro_batch_size": 1, "precision": "bf16", "max_steps": 1000,
                "gradient_checkpointing": True,
            },
            "data": {"max_length": LENGTH},
        }
    )  # fmt: skip


def table(name: str) -> str:
    """One row per engine and number of processes; a sequence of ``LENGTH`` tokens on each process."""
    lines = [
        f"# Plan of {MODELS[name]}\n",
        f"`python benchmarks/plan.py {name}`: AdaLoRA at rank 12 -> 8 of all linear maps, bf16, one sequence of "
        f"{LENGTH:,} tokens per process and step, gradient checkpointing, machines with 8 GPUs. Counted on fake "
        "tensors and by formula ([how](../docs/planning.md)), not measured on GPUs; times are a roofline.\n",
        "| engine | processes | weights | trained | optimizer | importance | gathered | activations | peak | after the "
        "freeze | wire per step | of AdaLoRA's | per allocation | s per step |",
        "| --- |" + " ---: |" * 13,
    ]
    architectures = Path(__file__).parents[1] / "recipes" / "configs" / "architectures"
    run = plan_run(configuration(name, 8), AutoModelForCausalLM, 100_000, architectures, "")
    about = run.described
    planner = Planner(about.config, about.auto_class, about.architecture, about.model, run.schedule)
    for engine in ENGINES:
        for world in WORLD_SIZES:
            plan = planner.plan(Cluster.parse("8x80GB", world // 8, engine), configuration(name, world))
            m, t = plan.before, plan.traffic
            cells = [m.weights, m.adapters, m.optimizer, m.importance, m.gathered, m.activations, m.peak]
            cells += [plan.after.peak, t.per_step, t.of_method_per_step, t.per_allocation]
            row = " | ".join(size(c) for c in cells)
            lines.append(f"| {engine} | {world:,} | {row} | {plan.time.step:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1]))
