"""Settings of DoRA (arXiv 2402.09353)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from adalora_dist.config.methods.base import ScaledConfig


def refuse_int8(method: str, run: Any) -> None:
    """Raise where a base that rounds its inputs would be asked for the norms of its rows."""
    if run.quantization.quantization == "int8":
        raise ValueError(
            f"quantization int8 with method {method}: such weights round what they are multiplied with, so the norms "
            "of rows would be of another matrix; set quantization to nf4 or none, or method to lora"
        )


class DoraConfig(ScaledConfig):
    """low-rank adapters of directions, and the length of every row of the weights"""

    method: Literal["dora"] = "dora"

    compiles: ClassVar[bool] = False
    formats: ClassVar[frozenset[str]] = frozenset({"merged", "peft"})
    formats_from_files: ClassVar[frozenset[str]] = formats

    def check(self, run: Any) -> None:
        super().check(run)
        refuse_int8(self.method, run)
