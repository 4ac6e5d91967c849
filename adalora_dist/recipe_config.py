"""What each of the paper's recipes adds to :class:`~adalora_dist.config.RunConfig`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import tyro
from pydantic import Field, model_validator

from adalora_dist.config import (
    AdapterConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)

GlueTask = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]
GLUE_TASKS: tuple[str, ...] = get_args(GlueTask)


class EncoderModelConfig(ModelConfig):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Storage type of the backbone; the head is trained in it. auto: as its files say."""
    classifier_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout before the classifier; default: as the model's own configuration says."""


class RepeatedTrainConfig(TrainConfig):
    seeds: tuple[int, ...] = ()
    """Repeat the whole run with each of these seeds, and report mean and standard deviation; default: seed alone."""


class GlueDataConfig(DataConfig):
    source: Annotated[str, tyro.conf.arg(name="data")] = ""
    """Folder with TASK/train and TASK/dev files (.jsonl or .parquet), or the word hub; empty: built-in sentences."""
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
    adapter: AdapterConfig = AdapterConfig(train_modules=("task-head",))
    data: GlueDataConfig = GlueDataConfig()
    train: RepeatedTrainConfig = RepeatedTrainConfig()


class SquadDataConfig(DataConfig):
    source: Annotated[str, tyro.conf.arg(name="data")] = ""
    """Folder with train and validation files (.jsonl or .parquet), or the word hub; empty: built-in passages."""
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
    adapter: AdapterConfig = AdapterConfig(train_modules=("task-head",))
    data: SquadDataConfig = SquadDataConfig()
    train: RepeatedTrainConfig = RepeatedTrainConfig()


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


class SummarizationDataConfig(DataConfig):
    bad_rows: Literal["error", "skip"] = "skip"
    """A row without text, as XSum has some: skip leaves it out and counts it in run.json; error names it."""
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


class E2EDataConfig(DataConfig):
    source: Annotated[str, tyro.conf.arg(name="data")] = ""
    """Folder with train and test files (.jsonl or .parquet), or the word hub; empty: built-in places."""
    max_length: int = Field(512, ge=16)
    """Longest training sequence in tokens; longer ones are refused."""
    max_train_rows: int | None = Field(None, ge=1)
    """Use at most this many training rows."""
    max_eval_rows: int | None = Field(None, ge=1)
    """Use at most this many meaning representations for evaluation, each with all of its references."""


class E2EConfig(RunConfig):
    data: E2EDataConfig = E2EDataConfig()
    evaluation: GenerationConfig = GenerationConfig()
