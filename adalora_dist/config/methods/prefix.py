"""Settings of prefix tuning (arXiv 2101.00190)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from adalora_dist.config.methods.base import SizedConfig


class PrefixConfig(SizedConfig):
    """keys and values of a few positions that every layer of a causal model sees before the text"""

    method: Literal["prefix"] = "prefix"
    prefix_length: int = Field(10, ge=1)
    """Number of positions."""
    prefix_init: Literal["zero", "normal"] = "zero"
    """Start of keys and values: 0, or N(0, 1) as PEFT's own default."""

    formats: ClassVar[frozenset[str]] = frozenset({"peft"})
    formats_from_files: ClassVar[frozenset[str]] = frozenset()
    has_adapters: ClassVar[bool] = True
    sized_by: ClassVar[tuple[str, ...]] = ("prefix_length",)

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
