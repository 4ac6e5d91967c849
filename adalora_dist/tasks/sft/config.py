"""What the recipe for one's own texts adds to :class:`~adalora_dist.config.sections.RunConfig`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import Field, model_validator

from adalora_dist.config.generation import GenerationConfig
from adalora_dist.config.sections import ColumnsConfig, PackedTrainConfig, RunConfig

FIELDS = (
    *("messages", "conversations", "system", "tools"),
    *("instruction", "input", "output", "history", "prompt", "completion", "text"),
)
"""What a row can have, by the names that ``columns`` gives to others."""


class SftDataConfig(ColumnsConfig):
    known_fields: ClassVar[tuple[str, ...]] = FIELDS
    source: Annotated[tuple[str, ...], tyro.conf.arg(name="data")] = ()
    """Files (.jsonl, .json, .parquet, .arrow, .csv, .tsv; also .gz, .zst), folders of them, or hub:ID[:SPLIT], each
    with =WEIGHT if its rows shall count more or less often than once; empty: built-in conversations."""
    eval_split: str = ""
    """What the validation loss is measured on: a file, folder or hub:ID:SPLIT, or the name of a split of the data;
    empty: a folder's own validation files, or else a share of the rows."""
    eval_share: float | None = Field(None, ge=0, lt=1)
    """Share of the rows held out for the validation loss, by their content; 0: none. Default: 0.05 where the data has
    no split for it."""
    chat_template: str = ""
    """File with the chat template (Jinja), saved with the model; empty: the tokenizer's, or a plain one, which is
    said."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Tokens that count in the loss: replies alone (assistant turns, completions), the last reply of each row, or
    everything."""
    max_length: int = Field(1024, ge=16)
    """Longest sequence in tokens; longer ones are cut on their right, and counted."""
    max_train_rows: int | None = Field(None, ge=1)
    """Read at most this many rows of each source."""
    max_eval_rows: int = Field(1000, ge=1)
    """Measure the validation loss on at most this many rows."""

    @property
    def always_validates(self) -> bool:
        return True

    @model_validator(mode="after")
    def _of_own_data(self) -> SftDataConfig:
        given = {"columns": " ".join(self.columns), "eval_split": self.eval_split, "eval_share": self.eval_share}
        for name, value in given.items():
            if value not in ("", None) and not self.source:
                raise ValueError(
                    f"{name} {value} without data: the built-in conversations have their own; give --data, or leave "
                    f"{name} out"
                )
        return self


class SftEvaluationConfig(GenerationConfig):
    num_beams: int = Field(1, ge=1)
    """Beams of the search for sample replies; 1: greedy."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest sample reply in tokens."""
    eval_batch_size: int = Field(4, ge=1)
    """Sequences per process in one evaluation forward."""
    show_samples: int = Field(3, ge=0)
    """Reply to the prompts of so many validation rows at every evaluation, and show the replies."""
    answer: str = ""
    """File of questions of several turns (MT-Bench's question.jsonl), answered when the training is done: answers.jsonl
    in the run folder, as MT-Bench's judge reads it; empty: none."""
    answer_tokens: int = Field(1024, ge=1)
    """Longest of these answers in tokens."""

    @model_validator(mode="after")
    def _samples_are_shown(self) -> SftEvaluationConfig:
        """Samples are shown before and after the training, too."""
        if self.merge_to_generate and not self.show_samples and not self.answer:
            raise ValueError(
                "merge_to_generate true with show_samples 0 and no answer: no text is generated; leave "
                "merge_to_generate out, or set show_samples"
            )
        return self


class SftConfig(RunConfig):
    data: SftDataConfig = SftDataConfig()
    train: PackedTrainConfig = PackedTrainConfig(
        learning_rate=2e-4, lr_schedule="cosine", lr_warmup_ratio=0.03, micro_batch_size=4, precision="auto"
    )
    evaluation: SftEvaluationConfig = SftEvaluationConfig()

    @model_validator(mode="after")
    def _something_to_evaluate_on(self) -> SftConfig:
        if self.evaluation.eval_every and self.data.eval_share == 0:
            raise ValueError(
                f"eval_every {self.evaluation.eval_every} with eval_share 0: no row is held out to evaluate on; leave "
                "one out"
            )
        return self
