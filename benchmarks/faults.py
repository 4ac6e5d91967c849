"""What happens to a run when one of its ranks goes wrong, counted on real processes (gloo, CPU).

    export PYTHONPATH=. OMP_NUM_THREADS=1
    python benchmarks/faults.py nan --trials 50          a nan or inf on one rank, at a random step of a random engine
    python benchmarks/faults.py stopped --trials 20      SIGSTOP to one rank at a random time
    python benchmarks/faults.py kill --trials 40         kill -9 of one rank at a random time, then --resume auto
    python benchmarks/faults.py divergence --trials 20   a rank whose pattern or lambda is changed behind its back

Each trial is a whole run of a two-layer model through the shared loop, with everything that the recipes use around it
(``tests/support/faulty_runs.py``). Results are in ``reliability.md``.
"""

from __future__ import annotations

import argparse
import collections
import os
import platform
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from adalora_dist.io.progress import progress_bar
from adalora_dist.training.faults.verdict import EXIT_PEER
from tests.support.faulty_runs import STEPS, Fault, Ranks, Untouched, corrupt, run

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


def nan(trial: int, rng: random.Random, folder: Path) -> tuple[str, bool, str]:
    """Weights, moments and importance averages as before the bad step, on every rank, and the budget met at the end."""
    engine, kind = ENGINES[trial % len(ENGINES)], rng.choice(["nan", "inf", "gradient"])
    fault = Fault(kind, step=rng.randrange(1, STEPS - 1), rank=rng.randrange(2))
    ended = Ranks(2, folder, run, folder, engine, fault, {"compact": False}, Untouched(fault)).wait()
    untouched = all(one.code == 0 and one.log.count("compared") == 1 for one in ended)
    return engine, untouched and len(list(folder.glob("published-*"))) == 2, "\n".join(one.log for one in ended)


def stopped(trial: int, rng: random.Random, folder: Path) -> tuple[str, bool, str]:
    """All others gone within the timeout + 2 s, the stopped rank named and ended with them."""
    rank, timeout = rng.randrange(3), 3
    endless = Fault("endless", step=0, rank=None, num_steps=STEPS)
    ranks = Ranks(3, folder, run, folder, "ddp", endless, {"peer_timeout_seconds": timeout})
    ranks.wait_for("step-1-0")
    time.sleep(rng.uniform(0, 1.5))
    os.kill(ranks.pids[rank], signal.SIGSTOP)
    start = time.monotonic()
    ended = ranks.wait()
    seconds = max(one.when for one in ended) - start
    named = sum(f"rank {rank} (process {ranks.pids[rank]} on" in one.log for one in ended) == 1
    codes = [one.code for one in ended] == [-signal.SIGKILL if k == rank else EXIT_PEER for k in range(3)]
    SECONDS.append(seconds)
    return f"rank {rank}", named and codes and seconds <= timeout + 2, f"{seconds:.2f} s\n" + ended[0].log


def divergence(trial: int, rng: random.Random, folder: Path) -> tuple[str, bool, str]:
    """The run ends with the reason before anything is published."""
    engine, what = rng.choice([("ddp", "keep"), ("ddp", "lambda"), ("fsdp2", "keep"), ("zero3", "keep")])
    at_step = rng.randrange(5, STEPS)
    ended = Ranks(2, folder, run, folder, engine, Fault(), None, corrupt(what, at_step)).wait()
    said = sum("differ between" in one.log for one in ended) == 1
    ok = said and not list(folder.glob("published-*")) and all(one.code != 0 for one in ended)
    return f"{what} on {engine}", ok, "\n".join(one.log for one in ended)


def kill(trial: int, rng: random.Random, folder: Path) -> tuple[str, bool, str]:
    """After kill -9 and --resume auto, all losses, patterns and adapters have the bits of a run without it.

    In every other trial the rank is killed while a checkpoint is being written; two of four write in a thread.
    """
    engine, in_thread = ("ddp", "fsdp2", "zero3")[trial % 3], trial // 2 % 2 == 1
    changes = {"checkpoint_every": 1, "resume": "auto", "async_checkpoints": in_thread}
    if engine not in UNDISTURBED:
        with tempfile.TemporaryDirectory() as name:
            [one, _] = Ranks(2, Path(name), run, Path(name), engine, Fault(), changes).wait()
            assert one.code == 0, one.log
            UNDISTURBED[engine] = torch.load(Path(name, "final.pt"), weights_only=True)
    victim, ranks = rng.randrange(2), Ranks(2, folder, run, folder, engine, Fault(), changes)
    ranks.wait_for(f"step-{rng.randrange(STEPS)}-0")
    checkpoints, deadline = folder / "run" / "checkpoints", time.monotonic() + 2
    if trial % 2:
        while not list(checkpoints.glob("*.partial")) and time.monotonic() < deadline:
            pass
        time.sleep(rng.uniform(0, 0.004))
    else:
        time.sleep(rng.uniform(0, 0.05))
    os.kill(ranks.pids[victim], signal.SIGKILL)
    killed = ranks.wait()
    when = "in a write" if list(checkpoints.glob("*.partial")) else "in a step"
    when += " with async_checkpoints" if in_thread else ""
    again = Ranks(2, folder / "again", run, folder, engine, Fault(), changes).wait()
    log = "\n".join(one.log for one in killed + again)
    if any(one.code for one in again):
        return f"{engine}, {when}", False, log
    final = torch.load(folder / "final.pt", weights_only=True)
    expected = UNDISTURBED[engine]
    equal = final.keys() == expected.keys() and all(torch.equal(final[name], expected[name]) for name in expected)
    return f"{engine}, {when}", equal and killed[victim].code == -signal.SIGKILL, log


UNDISTURBED: dict[str, dict[str, torch.Tensor]] = {}
SECONDS: list[float] = []
COMMANDS: dict[str, Callable[[int, random.Random, Path], tuple[str, bool, str]]] = {
    "nan": nan, "stopped": stopped, "kill": kill, "divergence": divergence,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    tqdm.monitor_interval = 0  # its thread would be there while ranks are forked
    good: collections.Counter[str] = collections.Counter()
    every: collections.Counter[str] = collections.Counter()
    for trial in progress_bar(range(args.trials), desc=args.command, unit="trial"):
        with tempfile.TemporaryDirectory() as folder:
            case, ok, log = COMMANDS[args.command](trial, rng, Path(folder))
        every[case] += 1
        good[case] += ok
        if not ok:
            print(f"trial {trial} ({case}) failed:\n{log}", flush=True)
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, seed {args.seed}")
    print(f"{args.command}: {sum(good.values())} of {sum(every.values())}")
    for case in sorted(every):
        print(f"  {case}: {good[case]} of {every[case]}")
    if SECONDS:
        median, longest = statistics.median(SECONDS), max(SECONDS)
        print(f"seconds from the signal to the last end: median {median:.2f}, longest {longest:.2f}")
    raise SystemExit(sum(good.values()) < args.trials)


if __name__ == "__main__":
    main()
