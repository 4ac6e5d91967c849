"""What the GLUE recipe adds to :class:`~adalora_dist.config.sections.RunConfig`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, ClassVar

import tyro
from pydantic import AfterValidator, Field, model_validator

from adalora_dist.config.data import ColumnsConfig, Known
from adalora_dist.config.encoders import EncoderModelConfig, EncoderTrainConfig
from adalora_dist.config.methods import AdaLoraConfig, AnyMethodConfig
from adalora_dist.config.sections import RunConfig

GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")


class GlueDataConfig(ColumnsConfig):
    known_fields: ClassVar[tuple[str, ...]] = ("text", "text2", "label")
    source: Annotated[str, tyro.conf.arg(name="data")] = ""
    """Folder with TASK/train and TASK/dev, or train and dev (.jsonl, .json, .parquet); one file of any name (.csv and
    .tsv, too); or the word hub; empty: built-in sentences."""
    task: Annotated[str, AfterValidator(Known(GLUE_TASKS))] = Field("sst2", min_length=1)
    """One of the eight GLUE tasks (cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte), or one's own under any other name:
    one or two texts, and as many classes as the training rows have labels."""
    regression: bool = False
    """The label of a task of one's own is a number to be predicted, and not the name of a class."""
    max_length: int = Field(128, ge=8)
    """Longest sequence in tokens; the longer text of a pair is cut first."""
    max_train_rows: int | None = Field(None, ge=1)
    """Use at most this many training rows."""
    max_eval_rows: int | None = Field(None, ge=1)
    """Use at most this many rows of each evaluation set."""

    @property
    def is_own(self) -> bool:
        """Whether the task is none of GLUE's."""
        return self.task not in GLUE_TASKS

    @model_validator(mode="after")
    def _of_own_tasks(self) -> GlueDataConfig:
        for name, value in (("regression", self.regression), ("columns", " ".join(self.columns))):
            if value and not self.is_own:
                raise ValueError(
                    f"{name} {value} with task {self.task}, which is GLUE's and has its own: give your task another "
                    f"name, or leave {name} out"
                )
        return self


class GlueConfig(RunConfig):
    model: EncoderModelConfig = EncoderModelConfig()
    adapter: AnyMethodConfig = AdaLoraConfig(train_modules=("task-head",))
    data: GlueDataConfig = GlueDataConfig()
    train: EncoderTrainConfig = EncoderTrainConfig()
