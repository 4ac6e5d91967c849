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
    prefix_init: Literal["zero", "normal"] | None = None
    """Start of keys and values: 0 (default), or N(0, 1) as PEFT's own; with prefix_hidden_size, of what they are made
    of: always normal, as equal positions would stay equal."""
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
        return dict(settings) | {"prefix_init": settings["prefix_init"] or start}

    @model_validator(mode="after")
    def _positions_differ(self) -> Self:
        if self.prefix_hidden_size is not None and self.prefix_init == "zero":
            raise ValueError(
                f"prefix_init zero with prefix_hidden_size {self.prefix_hidden_size}: all positions would start, and "
                "stay, equal; leave prefix_init out, or prefix_hidden_size"
            )
        return self

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
