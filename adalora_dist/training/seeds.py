"""A whole run once, or once with each of several seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from accelerate import Accelerator

from adalora_dist.tasks.glue.config import GlueConfig
from adalora_dist.tasks.glue.metrics import mean_and_deviation
from adalora_dist.tasks.squad.config import SquadConfig
from adalora_dist.training.report import metrics_table
from adalora_dist.training.run_folder import RunFolder

Config = TypeVar("Config", GlueConfig, SquadConfig)


def run_seeds(
    accelerator: Accelerator,
    config: Config,
    one_run: Callable[[Config], Mapping[str, float]],
    references: Mapping[str, Mapping[str, float]],
) -> None:
    """``one_run(config)``; with ``train.seeds`` for each of them, in a folder of its own, then mean and deviation.

    Args:
        one_run: trains, evaluates and exports; returns the scores at the end.
        references: scores to be shown beside the mean, by name.
    """
    train = config.train
    if not train.seeds:
        one_run(config)
        return
    overview = RunFolder(config, accelerator.is_main_process, {})
    runs = []
    for seed in train.seeds:
        accelerator.print(f"\nSeed {seed}")
        own = {"seed": seed, "seeds": (), "output_dir": f"{train.output_dir}/seed_{seed}"}
        runs.append(one_run(config.model_copy(update={"train": train.model_copy(update=own)})))
        accelerator.free_memory()
    summary = mean_and_deviation(runs)
    overview.write_json("results.json", {"seeds": train.seeds, "runs": runs, **references, "summary": summary})
    columns = {column: {name: value[column] for name, value in summary.items()} for column in ("mean", "deviation")}
    accelerator.print(f"\n{len(runs)} seeds, mean and sample standard deviation")
    accelerator.print(metrics_table({**columns, **references}))
