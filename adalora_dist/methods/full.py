"""Every weight of the model is trained: the reference for what adapters save."""

from __future__ import annotations

import torch
from torch import nn

from adalora_dist.io.errors import UserError
from adalora_dist.methods.protocol import Adapter, Method


class Full(Method):
    """No adapters, nothing frozen."""

    def adapt(self, model: nn.Module, generator: torch.Generator) -> list[Adapter]:
        """Make every parameter trainable.

        Raises:
            UserError: one is not float32.
        """
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32:
                raise UserError(
                    f"method=full: {name} is {parameter.dtype}, in which small updates are rounded away: set dtype to "
                    "float32"
                )
            parameter.requires_grad_(True)
        return []
