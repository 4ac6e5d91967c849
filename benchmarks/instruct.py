"""AdaLoRA and LoRA at equal final budget on instructions: SmolLM2-135M and Alpaca rows, every run a line of a JSONL.

    python benchmarks/instruct.py --data ../shared/data/instruct

--data has alpaca_train.json and alpaca_test.json. Runs ``recipes/llama_sft.py`` once per method and seed, with the
demonstration's model (fetched once), and prints a table of validation losses before, in the middle of and after the
training. Runs whose line is in --output are skipped, so the command can be stopped at any time and given again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adalora_dist.tasks.demo_models.smollm2 import demo_model_folder
from adalora_dist.tasks.glue.metrics import mean_and_deviation

ROOT = Path(__file__).resolve().parents[1]

# Written before the runs of three seeds: 60 steps of 4 rows of at most 96 tokens, judged on the same 32 rows; both
# methods at one learning rate, which is not tuned, one scale alpha / init_rank and equal final budget; seeds 1 to 3.
STEPS, EVERY = 60, 20
METHODS = {"adalora": "--init-rank 6 --target-rank 4 --alpha 12", "lora": "--init-rank 4 --alpha 8"}
COMMON = (
    "--learning-rate 1e-3 --batch-size 4 --micro-batch-size 4 --max-length 96 --max-eval-rows 32 --eval-batch-size 8 "
    "--lr-warmup-ratio 0.1 --show-samples 0 --export-formats none --precision fp32 --overwrite"
)


def command(method: str, seed: int, steps: int, data: Path, model: Path, folder: Path) -> list[str]:
    words = [sys.executable, "recipes/llama_sft.py", "--model", str(model), "--method", method, "--seed", str(seed)]
    words += ["--data", str(data / "alpaca_train.json"), "--eval-split", str(data / "alpaca_test.json")]
    words += ["--max-steps", str(steps), "--eval-every", str(EVERY), "--output-dir", str(folder)]
    return [*words, *shlex.split(METHODS[method]), *shlex.split(COMMON)]


def outcome(folder: Path) -> dict[str, float]:
    """Validation losses of a run, by when."""
    results = json.loads((folder / "results.json").read_text())
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    during = {f"step {line['step'] + 1}": line["eval_loss"] for line in lines if "eval_loss" in line}
    return {"before": results["before"]["loss"]} | during | {"after": results["after"]["loss"]}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Mean, deviation and each seed's loss, by method and when."""
    lines: list[str] = []
    for method in METHODS:
        own = [run["losses"] for run in runs if run["method"] == method]
        if not own:
            continue
        if not lines:
            lines = ["| | " + " | ".join(own[0]) + " |", "|---" * (1 + len(own[0])) + "|"]
        cells = []
        for when, value in mean_and_deviation(own).items():
            each = ", ".join(f"{run[when]:.4f}" for run in own)
            cells.append(f"{value['mean']:.4f} ± {value['deviation']:.4f} ({each})")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    model, environment = demo_model_folder(print), {**os.environ, "PYTHONPATH": str(ROOT)}
    lines = args.output.read_text().splitlines() if args.output.exists() else []
    known: list[dict[str, Any]] = list(map(json.loads, lines))
    runs: list[dict[str, Any]] = []
    for seed in args.seeds:
        for method in METHODS:
            about = {"method": method, "seed": seed, "steps": args.steps, "settings": f"{METHODS[method]} {COMMON}"}
            if done := [run for run in known if run | about == run]:
                runs += done[:1]
                continue
            with tempfile.TemporaryDirectory() as folder:
                words = command(method, seed, args.steps, args.data.resolve(), model, Path(folder))
                print(shlex.join(words), file=sys.stderr, flush=True)
                subprocess.run(words, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
                runs.append(about | {"losses": outcome(Path(folder))})
            with args.output.open("a") as file:
                file.write(json.dumps(runs[-1]) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
