"""What recipes whose models write texts add to their evaluation."""

from __future__ import annotations

from pydantic import Field, model_validator

from adalora_dist.config.sections import EvaluationConfig


class DecodingConfig(EvaluationConfig):
    merge_to_generate: bool = False
    """Add the adapters to their weights while texts are generated, and bring the weights back from a copy afterwards:
    fewer operations at each token, for host memory of these weights' size. In bf16 the texts are the merged model's."""
    show_samples: int = Field(0, ge=0)
    """Show so many generated texts at each evaluation while training."""

    @model_validator(mode="after")
    def _samples_are_shown(self) -> DecodingConfig:
        if self.show_samples and not self.eval_every:
            raise ValueError(
                f"show_samples {self.show_samples} with eval_every 0: nothing is generated while training; set "
                "eval_every, or leave show_samples out"
            )
        return self


class GenerationConfig(DecodingConfig):
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
