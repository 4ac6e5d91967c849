"""Every weight of the model is trained: the reference for what adapters save."""

from __future__ import annotations

import torch
from torch import nn

from adalora_dist.methods.protocol import Adapter, Method
from adalora_dist.methods.sites import train_in_place


class Full(Method):
    """No adapters, nothing frozen."""

    def adapt(self, model: nn.Module, generator: torch.Generator) -> list[Adapter]:
        """Make every parameter trainable.

        Raises:
            UserError: one is not float32.
        """
        train_in_place("full", model.named_parameters())
        return []
