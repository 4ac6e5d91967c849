"""Settings of ReLoRA (arXiv 2307.05695)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from adalora_dist.config.methods.base import ScaledConfig


class ReloraConfig(ScaledConfig):
    """LoRA that is merged into the weights, and started anew, several times in a run"""

    method: Literal["relora"] = "relora"
    restart_every_steps: int | None = Field(None, ge=1)
    """Optimizer steps between two restarts; default: a quarter of the run."""
    restart_warmup_steps: int | None = Field(None, ge=0)
    """Steps over which the learning rate rises again after a restart; default: a tenth of a cycle, at most 100."""

    formats: ClassVar[frozenset[str]] = frozenset({"merged", "lora"})

    def cycle_of(self, total_steps: int) -> tuple[int, int]:
        """(steps between two restarts, those over which the learning rate rises again) in a run of so many steps."""
        every = self.restart_every_steps or max(1, -(-total_steps // 4))
        return every, min(100, every // 10) if self.restart_warmup_steps is None else self.restart_warmup_steps

    def check(self, run: Any) -> None:
        super().check(run)
        every, warmup, total = self.restart_every_steps, self.restart_warmup_steps, run.train.max_steps
        if every is not None and warmup is not None and warmup > every:
            raise ValueError(
                f"restart_warmup_steps {warmup} with restart_every_steps {every}: the rate would never be reached; "
                f"set restart_warmup_steps to at most {every}"
            )
        if every is not None and total is not None and every >= total:
            raise ValueError(
                f"restart_every_steps {every} with max_steps {total}: there would be no restart; set it to less than "
                "max_steps, or method to lora"
            )
        if run.quantization.quantization != "none":
            raise ValueError(
                f"quantization {run.quantization.quantization} with method relora: each restart would quantise the "
                "merged weights anew; set quantization to none, or method to lora"
            )
