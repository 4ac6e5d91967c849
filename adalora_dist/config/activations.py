"""What is kept of a forward for its backward, as settings of every run. Never imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from adalora_dist.config.section import Section
from adalora_dist.io.errors import UserError


class ActivationsConfig(Section):
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    checkpoint_activations: Literal["full", "selective"] | Annotated[int, Field(ge=2)] = "full"
    """What gradient_checkpointing recomputes. full: all of every block, of which its input is kept; selective: all but
    attention (sdpa), whose outputs are kept, too; N: one block of N, and the others keep everything."""
    offload_activations: bool = False
    """Hold the inputs of blocks that gradient_checkpointing keeps in the host's memory."""

    @model_validator(mode="after")
    def _something_is_recomputed(self) -> ActivationsConfig:
        for name, default in (("checkpoint_activations", "full"), ("offload_activations", False)):
            if (value := getattr(self, name)) != default and not self.gradient_checkpointing:
                raise ValueError(
                    f"{name} {value} with gradient_checkpointing false: nothing is recomputed; set "
                    f"gradient_checkpointing to true, or leave {name} out"
                )
        return self


def check_activations_engine(settings: ActivationsConfig, engine: str) -> None:
    """Raise where the engine does not let a block be computed again as the settings say.

    Raises:
        UserError: it is ZeRO-3, whatever it has sharded by the time of the first step.
    """
    if settings.checkpoint_activations == "selective" and engine == "zero3":
        raise UserError(
            "checkpoint_activations selective under ZeRO-3: DeepSpeed gathers weights amid what is computed again, "
            "which torch takes for a forward that has changed; set checkpoint_activations to full, or use FSDP2"
        )
