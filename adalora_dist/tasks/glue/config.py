"""What the GLUE recipe adds to :class:`~adalora_dist.config.sections.RunConfig`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import tyro
from pydantic import Field

from adalora_dist.config.methods import AdaLoraConfig, AnyMethodConfig
from adalora_dist.config.sections import DataConfig, EncoderModelConfig, RepeatedTrainConfig, RunConfig

GlueTask = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]

GLUE_TASKS: tuple[str, ...] = get_args(GlueTask)


class GlueDataConfig(DataConfig):
    source: Annotated[str, tyro.conf.arg(name="data")] = ""
    """Folder with TASK/train and TASK/dev (.jsonl, .json, .parquet), or the word hub; empty: built-in sentences."""
    task: GlueTask = "sst2"
    """One of the eight GLUE tasks."""
    max_length: int = Field(128, ge=8)
    """Longest sequence in tokens; the longer text of a pair is cut first."""
    max_train_rows: int | None = Field(None, ge=1)
    """Use at most this many training rows."""
    max_eval_rows: int | None = Field(None, ge=1)
    """Use at most this many rows of each evaluation set."""


class GlueConfig(RunConfig):
    model: EncoderModelConfig = EncoderModelConfig()
    adapter: AnyMethodConfig = AdaLoraConfig(train_modules=("task-head",))
    data: GlueDataConfig = GlueDataConfig()
    train: RepeatedTrainConfig = RepeatedTrainConfig()
