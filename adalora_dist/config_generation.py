"""What the recipes that write text have beyond ``RunConfig``: data sections, and how text is generated."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro
from pydantic import Field

from adalora_dist.config import EvaluationConfig, RunConfig, Section


class GenerationConfig(EvaluationConfig):
    num_beams: int = Field(4, ge=1)
    """Beams of the search; 1: greedy."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest generated text."""
    min_new_tokens: int = Field(0, ge=0)
    """Shortest generated text."""
    length_penalty: float = 1.0
    """Scores of beams are divided by length to this power: above 0, larger prefers longer texts."""
    no_repeat_ngram_size: int = Field(0, ge=0)
    """No sequence of this many tokens occurs twice in a text; 0: allowed."""


class SummarizationDataConfig(Section):
    source: Annotated[str, tyro.conf.arg(name="data")] = ""
    """Folder with TASK/train and TASK/test files (.jsonl or .parquet), or the word hub; empty: built-in reports."""
    task: Literal["xsum", "cnn_dailymail"] = "xsum"
    """Which data set of the source."""
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
