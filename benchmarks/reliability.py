"""Does a run that was stopped continue as if nothing had been? Counted on real processes (gloo, CPU).

    export PYTHONPATH=. OMP_NUM_THREADS=1
    python benchmarks/reliability.py stops                                  one process, stopped at each of 60 steps
    python benchmarks/reliability.py stops --engine ddp fsdp2 zero2 zero3 --num-stops 10  two processes, a sample
    python benchmarks/reliability.py elsewhere                              on other engines and numbers of processes
    python benchmarks/reliability.py crashes                                every state that a crash can leave on disk
    python benchmarks/reliability.py damages --trials 1000                  files changed, cut off, lost, exchanged
    python benchmarks/reliability.py kills --trials 60                      exports, pushes and runs that go on, killed

Each prints the rows of a table in ``reliability.md`` and ends with an error at the first miss. What a run meets is in
``tests/support/resume_runs.py``, what happens to files in ``tests/support/checkpoint_faults.py``. What kills, stops and
poisons ranks is in ``faults.py``.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adalora_dist.io.progress import progress_bar
from tests.support.checkpoint_faults import check_crashes, check_damages
from tests.support.kill_trials import exports, pushes, resumes
from tests.support.ranks import run_ranks
from tests.support.resume_runs import (
    FINAL,
    PAIRS,
    STEPS,
    WORLD_SIZES,
    assert_continues_elsewhere,
    assert_continues_exactly,
    configuration,
    new_project,
    run,
    write_model,
)

ELSEWHERE = (25, STEPS - FINAL, STEPS - FINAL + 5)


def backbone(folder: Path) -> Path:
    run_ranks(1, lambda rank, world_size: write_model(folder))
    return folder / "model"


def stops(folder: Path, arguments: argparse.Namespace) -> None:
    """Stopped between two micro-steps, continued in new processes; compared with a run that was left alone."""
    model, dice = backbone(folder), random.Random(arguments.seed)
    print("| engine | processes | stopped at steps | bitwise equal |\n| --- | ---: | --- | ---: |")
    for engine in arguments.engine:
        world_size = WORLD_SIZES[engine]
        whole = new_project(model, folder / engine)
        expected: Any = run_ranks(world_size, run, engine, configuration(whole, world_size), timeout=600)
        steps = list(range(STEPS))
        if arguments.num_stops < STEPS:
            steps = sorted(dice.sample(steps, arguments.num_stops))
        for step in progress_bar(steps, desc=engine, unit="stop"):
            with tempfile.TemporaryDirectory() as own:
                project = new_project(model, Path(own) / "project")
                assert_continues_exactly(project, engine, expected, (step, dice.randrange(2)))
        listed = "all" if len(steps) == STEPS else ", ".join(map(str, steps))
        print(f"| {engine} | {world_size} | {listed} | {len(steps)} of {len(steps)} |", flush=True)


def elsewhere(folder: Path, arguments: argparse.Namespace) -> None:
    """Stopped while triplets are pruned, before the selection that freezes the pattern, and after their removal."""
    model = backbone(folder)
    print("| from | to | state and next pattern |", *(f"after {s} steps |" for s in ELSEWHERE))
    print("| --- | --- | --- |", *("---: |" for _ in ELSEWHERE))
    for pair in progress_bar(PAIRS, desc="pairs", unit="pair"):
        differences = []
        for stop in ELSEWHERE:
            with tempfile.TemporaryDirectory() as own:
                differences.append(assert_continues_elsewhere(model, Path(own), *pair, stop=stop))
        assert max(differences) < 1e-6, (pair, differences)
        (engine, size), (other, other_size) = pair[:2], pair[2:]
        cells = (f"{difference:.1e} |" for difference in differences)
        print(f"| {engine} x {size} | {other} x {other_size} | equal |", *cells, flush=True)


def crashes(folder: Path, arguments: argparse.Namespace) -> None:
    num_states, steps = check_crashes(folder)
    assert steps == {20, 30}
    print(f"{num_states:,} distinct states of the disk, a whole checkpoint found in {num_states:,}")


def damages(folder: Path, arguments: argparse.Namespace) -> None:
    counts = check_damages(folder, arguments.trials, arguments.seed)
    print("| damage | trials | undetected | fell back, file named |\n| --- | ---: | ---: | ---: |")
    for kind, num in counts.items():
        print(f"| {kind.replace('_', ' ')} | {num} | 0 | {num} |")
    print(f"| all | {sum(counts.values())} | 0 | {sum(counts.values())} |")


def kills(folder: Path, arguments: argparse.Namespace) -> None:
    tqdm.monitor_interval = 0  # its thread would be there while processes are forked
    print("| killed at random times | trials | killed | half seen by a reader | ended, whole and equal |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for what in (exports, pushes, resumes):
        num_trials = -(-arguments.trials // 3)
        (folder / what.__name__).mkdir()
        num_killed, num_whole = what(folder / what.__name__, num_trials, arguments.seed)
        print(f"| {what.__name__} | {num_trials} | {num_killed} | 0 | {num_whole} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["stops", "elsewhere", "crashes", "damages", "kills"])
    parser.add_argument("--engine", nargs="+", choices=list(WORLD_SIZES), default=["single"])
    parser.add_argument("--num-stops", type=int, default=STEPS)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        globals()[arguments.what](Path(folder), arguments)


if __name__ == "__main__":
    main()
