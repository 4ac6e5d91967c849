"""Print the tables of a grid, in Markdown: per task and rate, at each arm's own best rate, differences paired by seed.

    python benchmarks/evidence/tables.py [benchmarks/evidence/grid.jsonl]

Seeds that some arm of the table has not finished are left out of it, for all arms alike.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONTROLS = ("lora-4", "lora-8", "adalora")
"""What the others are compared with: the first that the file has."""
OWN_CONTROLS = {"adalora-1": "lora-1", "adalora-2": "lora-2"}
"""Of arms whose final budget only one other arm has."""
METRICS = {
    **dict.fromkeys(("sst2", "mrpc", "rte", "arc_easy", "openbookqa", "boolq"), "accuracy"),
    "cola": "matthews",
    "squad": "f1",
}
IN_PERCENT = ("squad",)
"""Tasks whose score is a percentage in the file, as it is published."""


class Grid:
    """The lines of a JSONL, by task, arm, rate and seed."""

    def __init__(self, lines: Sequence[str]) -> None:
        records = [json.loads(line) for line in lines]
        self._records = {(r["task"], r["arm"], r["rate"], r["seed"]): r for r in records}
        self.tasks, self.arms, rates, all_seeds = (
            list(dict.fromkeys(r[field] for r in records)) for field in ("task", "arm", "rate", "seed")
        )
        self.rates: list[float] = sorted(rates)
        self._control = next((arm for arm in CONTROLS if arm in self.arms), None)
        self.seeds = {
            task: [s for s in all_seeds if all((task, a, r, s) in self._records for a in self.arms for r in self.rates)]
            for task in self.tasks
        }
        """Of each task: the seeds with a run of every arm at every rate."""

    def control_of(self, arm: str) -> str | None:
        """The arm that it is compared with; None for such arms themselves."""
        control = OWN_CONTROLS.get(arm, self._control)
        return None if control == arm else control

    def values(self, task: str, arm: str, rate: float, field: str) -> list[float]:
        """Of the task's seeds, in order. Scores between 0 and 1."""
        scale = 100 if task in IN_PERCENT and field.endswith(METRICS[task]) else 1
        return [self._records[task, arm, rate, seed][field] / scale for seed in self.seeds[task]]

    def best_rate(self, task: str, arm: str) -> float:
        """By cross-entropy on the validation rows."""
        return min(self.rates, key=lambda rate: statistics.fmean(self.values(task, arm, rate, "validation loss")))

    def at_best(self, task: str, arm: str, field: str) -> list[float]:
        return self.values(task, arm, self.best_rate(task, arm), field)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and the standard error of the mean (nan for a single value)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def cell(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"


def differences(values: Sequence[float], control: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(values, control, strict=True)]


def passes(values: Sequence[float], control: Sequence[float], sign: int = 1) -> bool:
    """Whether the mean is at least the control's minus one standard error of the paired difference.

    Args:
        sign: -1 where less is better.
    """
    mean, error = mean_and_error([sign * d for d in differences(values, control)])
    return mean >= (0.0 if math.isnan(error) else -error)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)


def by_rate(grid: Grid, task: str, field: str, sign: int) -> str:
    """One line per rate; the arms, and whether each of them passes against the control."""
    rows = []
    for rate in grid.rates:
        cells = []
        for arm in grid.arms:
            values, control = grid.values(task, arm, rate, field), grid.control_of(arm)
            is_right = control is None or passes(values, grid.values(task, control, rate, field), sign)
            cells.append(cell(values) + ("" if is_right else " (fails)"))
        rows.append([f"{rate:g}", *cells])
    return table(["rate", *grid.arms], rows)


def at_best_rates(grid: Grid, tasks: Sequence[str]) -> str:
    """One line per arm: its score on the development rows at its own rate, per task and in the mean over tasks."""
    rows = []
    for arm in grid.arms:
        scores = [grid.at_best(task, arm, f"dev {METRICS[task]}") for task in tasks]
        mean = statistics.fmean(statistics.fmean(values) for values in scores)
        cells = [f"{cell(v)} (at {grid.best_rate(t, arm):g})" for t, v in zip(tasks, scores, strict=True)]
        rows.append([arm, *cells, f"{mean:.3f}"])
    return table(["arm", *tasks, "mean over tasks"], rows)


def paired(grid: Grid, tasks: Sequence[str], field: str | None = None) -> str:
    """Differences from the control at each arm's own rate, paired by seed. ``field``: default the task's score."""
    rows = []
    for arm in grid.arms:
        if (control := grid.control_of(arm)) is not None:
            fields = [field or f"dev {METRICS[task]}" for task in tasks]
            found = [
                differences(grid.at_best(t, arm, f), grid.at_best(t, control, f))
                for t, f in zip(tasks, fields, strict=True)
            ]
            rows.append([f"{arm} less {control}", *map(cell, found)])
    return table(["difference", *tasks], rows)


def returns(grid: Grid) -> str:
    """Of the triplets that left, how many came back: sums over all runs of an arm and a rate."""
    rows = []
    for arm in grid.arms:
        runs = {rate: [(t, rate) for t in grid.tasks if grid.seeds[t]] for rate in grid.rates}
        sums = {
            rate: [sum(sum(grid.values(t, arm, r, f)) for t, r in pairs) for f in ("returned", "pruned")]
            for rate, pairs in runs.items()
        }
        if any(pruned for _, pruned in sums.values()):
            rows.append([arm, *(f"{returned:g} of {pruned:g}" for returned, pruned in sums.values())])
    return table(["arm", *(f"{rate:g}" for rate in grid.rates)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=HERE / "grid.jsonl")
    lines = parser.parse_args().file.read_text(encoding="utf-8").splitlines()
    grid = Grid([line for line in lines if line])
    tasks = [task for task in grid.tasks if grid.seeds[task]]
    for task in tasks:
        seeds = ", ".join(map(str, grid.seeds[task]))
        print(f"### {task}: {METRICS[task]} on the development rows (seeds {seeds})\n")
        print(by_rate(grid, task, f"dev {METRICS[task]}", 1) + "\n")
        print(f"### {task}: cross-entropy on the development rows, less is better\n")
        print(by_rate(grid, task, "dev loss", -1) + "\n")
    if tasks:
        print("### At each arm's own rate, chosen on validation rows\n\n" + at_best_rates(grid, tasks) + "\n")
        print("### Differences paired by seed, score\n\n" + paired(grid, tasks) + "\n")
        print("### Differences paired by seed, cross-entropy\n\n" + paired(grid, tasks, "dev loss") + "\n")
        print("### Pruned triplets that came back\n\n" + returns(grid))


if __name__ == "__main__":
    main()
