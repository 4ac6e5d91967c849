"""All methods at one budget, each at its own learning rate: MiniLM on CoLA, SST-2 and MRPC, a line of a JSONL per run.

    python benchmarks/evidence/all_methods.py --data ../shared/data/glue           runs what is not in --output yet
    python benchmarks/evidence/all_methods.py --table                              prints the table of what is there

Protocol, written before the runs.

Fixed: all-MiniLM-L6-v2 with a new classifier that depends on the seed alone; rows, cuts, lengths, batches, steps,
loss, clipping and schedule of grid.py (its protocol.md): 120 steps of 8 rows on CoLA, 100 on SST-2, 50 on MRPC. The
classifier is trained at the method's rate and counts in no budget. AdamW without weight decay, float32, one CPU thread.

Budget: 80,000 parameters (0.08M), solved by the package; a branch with an alpha has scale 2. VeRA and DVoRA end below
it at full rank, and BitFit with all biases: they are the nearest that these methods can reach. head is the classifier
alone, the control outside the budget. Which matrices: ARMS.

Chosen, per task and method: one of three learning rates, that of the lowest mean cross-entropy on the 150 validation
rows (cut from the training rows) over the seeds for which the method has all three. Nothing else is chosen; no run is
left out. Vectors (VeRA, DVoRA, BitFit) and the head get rates three times as high, as published ones of vectors are.

Reported: mean and standard deviation (n - 1) over seeds 1, 2, 3 of the task's score on the first 250 development rows,
which choose nothing, with the number of seeds; a method without a whole seed has no figure. Steps are few, so the table
says what is learnt early, not what is learnt in the end. (On CoLA grid.py found 120 steps too few for any method.)

Order: seed by seed and task by task, SST-2 first, so that what is there is whole seeds of whole tasks first. (After the
first 18 runs: --tasks sst2 first, so that one task has its three seeds.)

Added after the first 18 runs, before any of its own: adadora, with adalora's settings.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from grid import Run, load_task, make, one_run, quietly_on_one_thread
from tables import METRICS, table
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from adalora_dist.config.methods import MethodConfig, method_config
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.parameter_budget import fit
from adalora_dist.tasks.demo_models.minilm import demo_encoder_folder

HERE = Path(__file__).resolve().parent
TASK_NAMES = ("sst2", "mrpc", "cola")
SEEDS = (1, 2, 3)
RATES = (1e-3, 3e-3, 1e-2)
RATES_OF_VECTORS = (3e-3, 1e-2, 3e-2)
BUDGET = "0.08M"
WIDTH = 384
"""Of the model, and so VeRA's full rank."""

_QUERY_VALUE: dict[str, Any] = {"targets": ("query", "value")}
_SCALED: dict[str, Any] = {"budget": BUDGET, "alpha": 24}  # scale 2: with a budget, alpha is of rank 12
ARMS: dict[str, MethodConfig] = {
    name: method_config(name, train_modules=("task-head",), **settings)
    for name, settings in {
        "head": {},
        "adalora": {**_SCALED, "compact": False},
        "adadora": {**_SCALED, "compact": False},
        "lora": {**_SCALED, **_QUERY_VALUE},
        "lora_fa": {**_SCALED, **_QUERY_VALUE},
        "dora": {**_SCALED, **_QUERY_VALUE},
        "vera": {"init_rank": WIDTH},
        "dvora": {"init_rank": WIDTH},
        "hydra": {"budget": BUDGET, "targets": (r".*layer\.\d+\.output\.dense",)},  # where it is published
        "dylora": {"budget": BUDGET, "alpha": 16, **_QUERY_VALUE},
        "bitfit": {},
        "houlsby": {"budget": BUDGET},
        "pfeiffer": {"budget": BUDGET},
        "adapterdrop": {"budget": BUDGET, "drop_layers": 2},
        "series": {"budget": BUDGET},
        "parallel": {"budget": BUDGET},
    }.items()
}
OF_VECTORS = ("head", "vera", "dvora", "bitfit")


def rates_of(arm: str) -> tuple[float, ...]:
    return RATES_OF_VECTORS if arm in OF_VECTORS else RATES


def runs(tasks: Sequence[str] = TASK_NAMES) -> Iterator[Run]:
    for seed in SEEDS:
        for task in tasks:
            for arm in ARMS:
                for rate in rates_of(arm):
                    yield Run(task, arm, rate, seed)


def num_trained(arm: MethodConfig, folder: Path) -> int:
    """Parameters that count in the budget."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))
    if (fitted := fit(model, arm)) is not None:
        return fitted.num_trained
    backbone = model.base_model
    adapt(model, arm)
    return sum(p.numel() for p in backbone.parameters() if p.requires_grad)


def cell(records: Mapping[Run, Mapping[str, Any]], task: str, arm: str, field: str) -> str:
    """What the development rows say at the rate that the validation rows choose."""
    rates = rates_of(arm)
    seeds = [seed for seed in SEEDS if all(Run(task, arm, rate, seed) in records for rate in rates)]
    if not seeds:
        return "–"

    def values(rate: float, field: str) -> list[float]:
        return [records[Run(task, arm, rate, seed)][field] for seed in seeds]

    best = min(rates, key=lambda rate: statistics.fmean(values(rate, "validation loss")))
    scores = values(best, field)
    spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.3f}{spread} (n {len(scores)}, {best:g})"


def print_table(output: Path, folder: Path) -> None:
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    records = {Run(*(line[field] for field in Run._fields)): line for line in lines}
    sizes = {arm: f"{num_trained(config, folder):,}" for arm, config in ARMS.items()}
    print(f"{len(records)} of {len(list(runs()))} runs.")
    for names in (METRICS, dict.fromkeys(TASK_NAMES, "loss")):
        rows = [
            [arm, size, *(cell(records, task, arm, f"dev {names[task]}") for task in TASK_NAMES)]
            for arm, size in sizes.items()
        ]
        header = (f"{task}, {names[task]}".replace("loss", "cross-entropy") for task in TASK_NAMES)
        print("\n" + table(["method", "parameters", *header], rows))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with TASK/{train,dev}.jsonl")
    parser.add_argument("--output", type=Path, default=HERE / "all_methods.jsonl")
    parser.add_argument("--tasks", nargs="+", choices=TASK_NAMES, default=TASK_NAMES)
    parser.add_argument("--table", action="store_true", help="print the table of what is there; run nothing")
    args = parser.parse_args(arguments)
    quietly_on_one_thread()
    folder = demo_encoder_folder()
    if args.table:
        return print_table(args.output, folder)
    if not args.data:
        parser.error("--data is needed, a folder with TASK/{train,dev}.jsonl; or --table")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = {name: load_task(name, args.data, tokenizer) for name in args.tasks}
    make(runs(args.tasks), args.output, lambda run: one_run(run, ARMS[run.arm], data[run.task], folder))


if __name__ == "__main__":
    main()
