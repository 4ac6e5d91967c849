"""A whole run once, or once with each of several seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from adalora_dist.tasks.glue.config import GlueConfig
from adalora_dist.tasks.glue.metrics import mean_and_deviation
from adalora_dist.tasks.squad.config import SquadConfig
from adalora_dist.training.report import metrics_table
from adalora_dist.training.run import Run
from adalora_dist.training.run_folder import RunFolder

Config = TypeVar("Config", GlueConfig, SquadConfig)


def each_seed(run: Run[Config], references: Mapping[str, Mapping[str, float]]) -> Iterator[Run[Config]]:
    """``run`` itself, begun; with ``train.seeds`` a run of each of them, in a folder of its own.

    When the last of these is done: their mean and deviation, in results.json and on the console. Their scores are
    those that ``finish`` was given.

    Args:
        references: scores to be shown beside the mean, by name.
    """
    seeds = run.config.train.seeds
    if not seeds:
        run.begin()
        yield run
        return
    overview = RunFolder(run.config, run.is_main, {})
    scores = []
    for seed in seeds:
        run.say(f"\nSeed {seed}")
        one = run.with_seed(seed)
        one.begin()
        yield one
        scores.append(one.scores)
        one.free()
    summary = mean_and_deviation(scores)
    overview.write_json("results.json", {"seeds": seeds, "runs": scores, **references, "summary": summary})
    columns = {column: {name: value[column] for name, value in summary.items()} for column in ("mean", "deviation")}
    run.say(f"\n{len(scores)} seeds, mean and sample standard deviation")
    run.say(metrics_table({**columns, **references}))
