"""Sections of the recipes whose models read a text and judge it by a head of the task's own. Never imports torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from adalora_dist.config.sections import ModelConfig, RepeatedTrainConfig


class EncoderModelConfig(ModelConfig):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Storage type of the backbone; the head is trained in it. auto: as its files say."""
    classifier_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout before the classifier; default: as the model's own configuration says."""


class EncoderTrainConfig(RepeatedTrainConfig):
    @model_validator(mode="after")
    def _predicts_no_words(self) -> EncoderTrainConfig:
        if self.logits_chunk not in ("auto", 0):
            raise ValueError(
                f"logits_chunk {self.logits_chunk}: the task's head has no logits of words to be made in chunks; leave "
                "logits_chunk out"
            )
        return self
