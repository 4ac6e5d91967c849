"""Settings of prefix tuning (arXiv 2101.00190)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from adalora_dist.config.methods.base import SizedConfig


class PrefixConfig(SizedConfig):
    """keys and values of a few positions that every layer of a causal model sees before the text"""

    method: Literal["prefix"] = "prefix"
    prefix_length: int = Field(10, ge=1)
    """Number of positions."""
    prefix_init: Literal["zero", "normal", "text"] | None = None
    """Start of keys and values: 0 (default), N(0, 1) as PEFT's own, or those of prefix_text; with prefix_hidden_size,
    of what they are made of: always normal, as equal positions would stay equal."""
    prefix_text: str | None = None
    """The prefix starts as the first prefix_length tokens of this text, as the plain model reads them: the run begins
    as if every text had them in front. Sets prefix_init to text."""
    prefix_hidden_size: int | None = Field(None, ge=1)
    """Width of an MLP that makes keys and values of embeddings while they are trained, PEFT's prefix_projection; what
    it makes is all that is exported."""

    formats: ClassVar[frozenset[str]] = frozenset({"peft"})
    formats_from_files: ClassVar[frozenset[str]] = frozenset()
    has_adapters: ClassVar[bool] = True
    sized_by: ClassVar[tuple[str, ...]] = ("prefix_length",)

    @classmethod
    def resolved(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        start = "zero" if settings["prefix_hidden_size"] is None else "normal"
        start = start if settings["prefix_text"] is None else "text"
        return dict(settings) | {"prefix_init": settings["prefix_init"] or start}

    @model_validator(mode="after")
    def _positions_differ(self) -> Self:
        if self.prefix_hidden_size is not None and self.prefix_init == "zero":
            raise ValueError(
                f"prefix_init zero with prefix_hidden_size {self.prefix_hidden_size}: all positions would start, and "
                "stay, equal; leave prefix_init out, or prefix_hidden_size"
            )
        return self

    @model_validator(mode="after")
    def _text_is_there(self) -> Self:
        if self.prefix_init == "text" and self.prefix_text is None:
            raise ValueError("prefix_init text without prefix_text: give the text")
        if self.prefix_text is None:
            return self
        if not self.prefix_text.strip():
            raise ValueError(f"prefix_text {self.prefix_text!r}: give a text, or leave it out")
        if self.prefix_init not in (None, "text"):
            raise ValueError(f"prefix_init {self.prefix_init} with prefix_text: there can be one start; leave one out")
        if self.prefix_hidden_size is not None:
            raise ValueError(
                f"prefix_text with prefix_hidden_size {self.prefix_hidden_size}: keys and values that an MLP makes "
                "cannot start as those of a text; leave one out"
            )
        return self

    @property
    def start_text(self) -> str | None:
        return self.prefix_text

    @property
    def size(self) -> str:
        return f"length {self.prefix_length}"

    @property
    def num_positions(self) -> int:
        return self.prefix_length

    def check(self, run: Any) -> None:
        super().check(run)
        if run.train.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing true with method prefix: transformers drops the cache that holds the prefix "
                "when it computes a layer again; set gradient_checkpointing to false, or method to lora"
            )
        if self.train_modules and "peft" in run.export.export_formats:
            raise ValueError(
                f"export_formats peft with method prefix and train_modules {' '.join(self.train_modules)}: PEFT's form "
                "holds the prefix alone; leave peft out of export_formats, or train_modules out"
            )
