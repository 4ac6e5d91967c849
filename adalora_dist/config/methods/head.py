"""Settings of the control that trains parts of a frozen model."""

from __future__ import annotations

from typing import Any, Literal

from adalora_dist.config.methods.base import MethodConfig, ModulePatterns


class HeadConfig(MethodConfig):
    """train_modules alone"""

    method: Literal["head"] = "head"
    train_modules: ModulePatterns = ("task-head",)
    """Modules that are trained, by name; task-head: all that lies outside the backbone."""

    def check(self, run: Any) -> None:
        super().check(run)
        if not self.train_modules:
            raise ValueError(
                "method head with no train_modules: nothing would be trained; name modules in train_modules, or set it "
                "to task-head for all that lies outside the backbone"
            )
