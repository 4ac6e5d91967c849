"""What the SQuAD recipe adds to :class:`~adalora_dist.config.sections.RunConfig`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import Field, model_validator

from adalora_dist.config.encoders import EncoderModelConfig, EncoderTrainConfig
from adalora_dist.config.methods import AdaLoraConfig, AnyMethodConfig
from adalora_dist.config.sections import ColumnsConfig, RunConfig


class SquadDataConfig(ColumnsConfig):
    known_fields: ClassVar[tuple[str, ...]] = ("id", "question", "context", "answers")
    source: Annotated[str, tyro.conf.arg(name="data")] = ""
    """Folder with train and validation, or one file of any name (.jsonl, .json as SQuAD has it, too, .parquet), or the
    word hub; empty: built-in passages."""
    task: Literal["v1.1", "v2.0"] = "v1.1"
    """v1.1: every question has an answer in its passage; v2.0: some have none."""
    max_length: int = Field(384, ge=16)
    """Longest window of question and passage in tokens."""
    doc_stride: int = Field(128, ge=1)
    """Tokens of a passage that two windows next to each other share."""
    max_question_length: int = Field(64, ge=8)
    """Longest question in tokens; the rest is cut."""
    max_train_rows: int | None = Field(None, ge=1)
    """Use at most this many training questions."""
    max_eval_rows: int | None = Field(None, ge=1)
    """Use at most this many evaluation questions."""
    num_best: int = Field(20, ge=1)
    """Start and end positions considered in each window, and answers kept for each question."""
    max_answer_length: int = Field(30, ge=1)
    """Longest predicted answer in tokens."""
    null_threshold: float = 0.0
    """v2.0: 'no answer' is predicted where its score exceeds that of the best answer by more than this."""

    @model_validator(mode="after")
    def _windows_advance(self) -> SquadDataConfig:
        least = self.max_question_length + self.doc_stride + 5  # up to four special tokens, and one that is new
        if self.max_length < least:
            raise ValueError(
                f"max_length {self.max_length} with max_question_length {self.max_question_length} and doc_stride "
                f"{self.doc_stride}: windows might not advance, max_length must be at least {least}; lower doc_stride"
            )
        return self


class SquadConfig(RunConfig):
    model: EncoderModelConfig = EncoderModelConfig()
    adapter: AnyMethodConfig = AdaLoraConfig(train_modules=("task-head",))
    data: SquadDataConfig = SquadDataConfig()
    train: EncoderTrainConfig = EncoderTrainConfig()
