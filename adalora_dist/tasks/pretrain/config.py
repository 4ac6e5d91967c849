"""What the recipe for pre-training adds to :class:`~adalora_dist.config.sections.RunConfig`. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro
from pydantic import Field, model_validator

from adalora_dist.config.methods import AnyMethodConfig, GaLoreConfig
from adalora_dist.config.sections import (
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)

Size = Literal["demo", "60m", "130m", "350m", "1b"]
DEFAULT_EVAL_SHARE = 0.01
C4 = "c4"
"""The word of ``--data`` for allenai/c4, English."""


class PretrainModelConfig(ModelConfig):
    name: Annotated[str, tyro.conf.arg(name="model")] = ""
    """Model to train further; empty: a LLaMA of random weights in the size that size says."""
    size: Size = "demo"
    """Shape of a new model: 60m, 130m, 350m and 1b as in the GaLore paper's tables, or the demonstration's half million
    parameters."""
    tokenizer: str = ""
    """Hub id or local folder of a new model's tokenizer; empty: a byte-level BPE, made from the data's beginning."""


class PretrainDataConfig(DataConfig):
    source: Annotated[tuple[str, ...], tyro.conf.arg(name="data")] = ()
    """Text: files (.jsonl, .json, .parquet, .arrow, .csv, .tsv, .txt; also .gz, .zst) and folders of them, read one row
    after the other; c4: the English part of allenai/c4 from the Hub, as far as it is needed; empty: built-in
    stories."""
    column: str = "text"
    """Column with the text of a row."""
    eval_split: str = ""
    """File or folder that the validation perplexity is measured on; empty: a share of the documents (c4: its own)."""
    eval_share: float | None = Field(None, gt=0, lt=1)
    """Share of the documents held out for the validation perplexity, by their content. Default: 0.01."""
    max_length: int = Field(256, ge=8)
    """Tokens of every sequence."""
    max_eval_tokens: int = Field(1_000_000, ge=1)
    """Measure the validation perplexity on at most so many tokens."""

    @property
    def always_validates(self) -> bool:
        return True

    @property
    def held_out_share(self) -> float:
        """``eval_share``, or its default."""
        return DEFAULT_EVAL_SHARE if self.eval_share is None else self.eval_share

    @model_validator(mode="after")
    def _one_sequence_to_validate_on(self) -> PretrainDataConfig:
        if self.max_eval_tokens < self.max_length:
            raise ValueError(
                f"max_eval_tokens {self.max_eval_tokens} is not one sequence of max_length {self.max_length}; raise it"
            )
        return self

    @model_validator(mode="after")
    def _of_own_data(self) -> PretrainDataConfig:
        if self.eval_split and not self.source:
            raise ValueError(
                f"eval_split {self.eval_split} without data: the built-in stories have their own; give --data, or "
                "leave eval_split out"
            )
        if C4 in self.source and (len(self.source) > 1 or self.eval_split):
            raise ValueError(
                f"data {' '.join(self.source)}: c4 is read by itself, with its own validation documents; leave the "
                "others and eval_split out"
            )
        return self


class PretrainTrainConfig(TrainConfig):
    num_tokens: int | None = Field(None, ge=1)
    """Training tokens, from which the number of steps follows; ignored when max_steps is set. None: see epochs."""


class PretrainConfig(RunConfig):
    model: PretrainModelConfig = PretrainModelConfig()
    adapter: AnyMethodConfig = GaLoreConfig()
    data: PretrainDataConfig = PretrainDataConfig()
    train: PretrainTrainConfig = PretrainTrainConfig(
        epochs=1, batch_size=512, micro_batch_size=32, learning_rate=1e-2, lr_schedule="cosine", lr_warmup_ratio=0.1,
        lr_end_ratio=0.1, precision="auto",
    )  # fmt: skip

    @model_validator(mode="after")
    def _nothing_stays_random(self) -> PretrainConfig:
        trains_all = self.adapter.trains_backbone or self.adapter.train_modules
        if not self.model.name and not trains_all:
            raise ValueError(
                f"method {self.adapter.method} with no train_modules and no model: embeddings, norms and head would "
                "stay random; set train_modules to model.embed_tokens .*norm lm_head"
            )
        if self.model.name and (self.model.tokenizer or self.model.size != "demo"):
            given = f"tokenizer {self.model.tokenizer}" if self.model.tokenizer else f"size {self.model.size}"
            raise ValueError(f"{given} with model {self.model.name}: that has its own; leave one out")
        return self

    @model_validator(mode="after")
    def _needs_an_end(self) -> PretrainConfig:
        if C4 in self.data.source and self.num_steps is None:
            raise ValueError("data c4 without num_tokens or max_steps: a run of all of c4 has no end; set one of them")
        return self

    @property
    def num_steps(self) -> int | None:
        """Optimizer steps, where max_steps or num_tokens says them."""
        if self.train.max_steps or not self.train.num_tokens:
            return self.train.max_steps
        return max(1, -(-self.train.num_tokens // (self.train.batch_size * self.data.max_length)))

    def with_steps(self) -> PretrainConfig:
        """With the steps that num_tokens asks for as max_steps."""
        return self.model_copy(update={"train": self.train.model_copy(update={"max_steps": self.num_steps})})
