"""Settings of full fine-tuning: there are none."""

from __future__ import annotations

from typing import ClassVar, Literal

from adalora_dist.config.methods.base import MethodConfig


class FullConfig(MethodConfig):
    """every weight of the model"""

    method: Literal["full"] = "full"
    train_modules: ClassVar[tuple[str, ...]] = ()  # type: ignore[misc]  # no setting: every weight is trained anyway

    trains_backbone: ClassVar[bool] = True
