"""Settings of AdaDoRA: ranks that adapt as AdaLoRA's do (arXiv 2303.10512), within DoRA (arXiv 2402.09353)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from adalora_dist.config.methods.adalora import AdaptiveConfig
from adalora_dist.config.methods.dora import refuse_int8


class AdaDoraConfig(AdaptiveConfig):
    """adalora's adaptive ranks for directions, and the length of every row of the weights"""

    method: Literal["adadora"] = "adadora"

    compiles: ClassVar[bool] = False
    formats: ClassVar[frozenset[str]] = frozenset({"merged", "peft"})
    formats_from_files: ClassVar[frozenset[str]] = formats

    def check(self, run: Any) -> None:
        super().check(run)
        refuse_int8(self.method, run)
