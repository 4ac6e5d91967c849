"""What the commonsense recipe adds to :class:`~adalora_dist.config.sections.RunConfig`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import AfterValidator, Field, model_validator

from adalora_dist.config.data import ColumnsConfig, Known
from adalora_dist.config.generation import DecodingConfig
from adalora_dist.config.sections import PackedTrainConfig, RunConfig

COMMONSENSE_TASKS = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


class CommonsenseDataConfig(ColumnsConfig):
    known_fields: ClassVar[tuple[str, ...]] = ("question", "choices", "answer")
    source: Annotated[str, tyro.conf.arg(name="data")] = ""
    """Folder with TASK/train and TASK/test, or train and test (.jsonl, .json, .parquet); one file of any name; or the
    word hub; empty: built-in questions."""
    tasks: tuple[Annotated[str, AfterValidator(Known(COMMONSENSE_TASKS))], ...] = ()
    """Which tasks: of the eight (boolq, piqa, siqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa), or
    folders of one's own under any name. Default: those of the eight that the source has, or else all in it."""
    max_length: int = Field(256, ge=8)
    """Longest training sequence in tokens; a longer prompt is cut on its left, the answer never."""
    train_on: Literal["output", "all"] = "output"
    """Tokens that count in the loss: the answer alone, or prompt and answer."""
    max_train_rows: int | None = Field(None, ge=1)
    """Use at most this many training rows per task."""
    max_eval_rows: int | None = Field(None, ge=1)
    """Use at most this many evaluation rows per task."""


class CommonsenseEvaluationConfig(DecodingConfig):
    evaluate_by: tuple[Literal["likelihood", "generation"], ...] = ("likelihood", "generation")
    """likelihood: the choice with the highest log-likelihood; generation: greedy decoding, then parsing."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Length of the generated replies; default: the tokens of the longest reply that a question allows."""

    @model_validator(mode="after")
    def _replies_are_generated(self) -> CommonsenseEvaluationConfig:
        if "generation" in self.evaluate_by:
            return self
        for name in ("show_samples", "merge_to_generate", "max_new_tokens"):
            if value := getattr(self, name):
                raise ValueError(
                    f"{name} {str(value).lower()} with evaluate_by {' '.join(self.evaluate_by) or '()'}: no reply is "
                    f"generated; add generation, or leave {name} out"
                )
        return self


class CommonsenseConfig(RunConfig):
    data: CommonsenseDataConfig = CommonsenseDataConfig()
    train: PackedTrainConfig = PackedTrainConfig()
    evaluation: CommonsenseEvaluationConfig = CommonsenseEvaluationConfig()
