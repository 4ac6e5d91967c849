"""Validation perplexity of the pre-training methods at equal tokens, with several seeds, on the recipe's demonstration.

    python benchmarks/pretrain_methods.py                       about an hour on one core
    python benchmarks/pretrain_methods.py --steps 20 --seeds 1 --rates 5e-3

Every method gets each learning rate once, with the first seed, and the other seeds at the best of them: the same search
for all; the choice was made on the first seed's validation text. Runs are processes of one
thread, one at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 (once, before the forks)

import adalora_dist.training.run  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("full", "galore", "relora", "lora", "low_rank")


def _recipe() -> Any:
    spec = importlib.util.spec_from_file_location("llama_pretrain", ROOT / "recipes" / "llama_pretrain.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recipe = _recipe()


def perplexity(method: str, rate: float, seed: int, steps: int, folder: Path) -> float:
    """Of the held-out text after a run, in a process forked from this one, which has imported everything."""
    out = folder / f"{method}-{rate:g}-{seed}"
    words = [
        *("--config", str(recipe.DEMO_CONFIG), "--method", method, "--learning-rate", str(rate), "--seed", str(seed)),
        *("--max-steps", str(steps), "--output-dir", str(out), "--eval-every", "0", "--checkpoint-every", "0"),
        *("--no-evaluate-before", "--no-verify-export"),
    ]
    if (child := os.fork()) == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            with (folder / "log").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                recipe.main(recipe.configuration(words))
            code = 0
        finally:
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit((folder / "log").read_text())
    found: float = json.loads((out / "results.json").read_text())["after"]["perplexity"]
    print(f"{method:9} rate {rate:g} seed {seed}: {found:.3f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 5e-3, 1e-2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for method in args.methods:
            first = {rate: perplexity(method, rate, args.seeds[0], args.steps, folder) for rate in args.rates}
            best = min(first, key=lambda rate: first[rate])
            others = [perplexity(method, best, seed, args.steps, folder) for seed in args.seeds[1:]]
            rows.append((method, best, [first[best], *others], len(args.rates) > 1 and best in _ends(args.rates)))
    print(f"\n{args.steps} steps of 2,048 tokens; perplexity, mean and standard deviation over seeds {args.seeds}")
    for method, rate, values, at_the_edge in sorted(rows, key=lambda row: statistics.mean(row[2])):
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        edge = ", the edge of the rates tried" if at_the_edge else ""
        print(f"{method:9} {statistics.mean(values):7.3f} +- {deviation:.3f}   (rate {rate:g}{edge})")


def _ends(rates: list[float]) -> tuple[float, float]:
    return min(rates), max(rates)


if __name__ == "__main__":
    main()
