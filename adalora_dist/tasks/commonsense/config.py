"""What the commonsense recipe adds to :class:`~adalora_dist.config.sections.RunConfig`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import tyro
from pydantic import Field

from adalora_dist.config.sections import DataConfig, EvaluationConfig, RunConfig

CommonsenseTask = Literal["boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]

COMMONSENSE_TASKS: tuple[str, ...] = get_args(CommonsenseTask)


class CommonsenseDataConfig(DataConfig):
    source: Annotated[str, tyro.conf.arg(name="data")] = ""
    """Folder with TASK/train and TASK/test (.jsonl, .json, .parquet), or the word hub; empty: built-in questions."""
    tasks: tuple[CommonsenseTask, ...] = ()
    """Which of the eight tasks; default: all that the source has."""
    max_length: int = Field(256, ge=8)
    """Longest training sequence in tokens; a longer prompt is cut on its left, the answer never."""
    train_on: Literal["output", "all"] = "output"
    """Tokens that count in the loss: the answer alone, or prompt and answer."""
    max_train_rows: int | None = Field(None, ge=1)
    """Use at most this many training rows per task."""
    max_eval_rows: int | None = Field(None, ge=1)
    """Use at most this many evaluation rows per task."""


class CommonsenseEvaluationConfig(EvaluationConfig):
    evaluate_by: tuple[Literal["likelihood", "generation"], ...] = ("likelihood", "generation")
    """likelihood: the choice with the highest log-likelihood; generation: greedy decoding, then parsing."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Length of the generated replies; default: the tokens of the longest reply that a question allows."""


class CommonsenseConfig(RunConfig):
    data: CommonsenseDataConfig = CommonsenseDataConfig()
    evaluation: CommonsenseEvaluationConfig = CommonsenseEvaluationConfig()
