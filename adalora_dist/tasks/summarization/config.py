"""What the summarisation recipe adds to :class:`~adalora_dist.config.sections.RunConfig`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import AfterValidator, Field

from adalora_dist.config.data import ColumnsConfig, Known
from adalora_dist.config.generation import GenerationConfig
from adalora_dist.config.sections import RunConfig

HUB_TASKS = ("xsum", "cnn_dailymail")
"""Those that data hub has."""


class SummarizationDataConfig(ColumnsConfig):
    known_fields: ClassVar[tuple[str, ...]] = ("document", "summary")
    bad_rows: Literal["error", "skip"] = "skip"
    """A row without text, as XSum has some: skip leaves it out and counts it in run.json; error names it."""
    source: Annotated[str, tyro.conf.arg(name="data")] = ""
    """Folder with TASK/train and TASK/test, or train and test (.jsonl, .json, .parquet); one file of any name (.csv and
    .tsv, too); or the word hub; empty: built-in reports."""
    task: Annotated[str, AfterValidator(Known(HUB_TASKS))] = Field("xsum", min_length=1)
    """Which data set of the source: xsum or cnn_dailymail of the Hub, or a folder of one's own under any name."""
    max_source_length: int = Field(768, ge=8)
    """Longest document in tokens; longer ones are cut on their right."""
    max_target_length: int = Field(64, ge=4)
    """Longest summary in tokens that is trained on."""
    max_train_rows: int | None = Field(None, ge=1)
    """Use at most this many training rows."""
    max_eval_rows: int | None = Field(None, ge=1)
    """Use at most this many evaluation rows."""


class SummarizationConfig(RunConfig):
    data: SummarizationDataConfig = SummarizationDataConfig()
    evaluation: GenerationConfig = GenerationConfig()
