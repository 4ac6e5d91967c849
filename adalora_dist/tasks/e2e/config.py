"""What the E2E recipe adds to :class:`~adalora_dist.config.sections.RunConfig`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, ClassVar

import tyro
from pydantic import Field

from adalora_dist.config.generation import GenerationConfig
from adalora_dist.config.sections import ColumnsConfig, RunConfig


class E2EDataConfig(ColumnsConfig):
    known_fields: ClassVar[tuple[str, ...]] = ("mr", "ref")
    source: Annotated[str, tyro.conf.arg(name="data")] = ""
    """Folder with train and test (.jsonl, .json, .parquet); one file of any name (.csv and .tsv, too); or the word hub;
    empty: built-in places."""
    max_length: int = Field(512, ge=16)
    """Longest training sequence in tokens; longer ones are refused."""
    max_train_rows: int | None = Field(None, ge=1)
    """Use at most this many training rows."""
    max_eval_rows: int | None = Field(None, ge=1)
    """Use at most this many meaning representations for evaluation, each with all of its references."""


class E2EConfig(RunConfig):
    data: E2EDataConfig = E2EDataConfig()
    evaluation: GenerationConfig = GenerationConfig()
