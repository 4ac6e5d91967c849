"""What becomes of blocks before they train, as settings of every run. Never imports torch."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from adalora_dist.config.activations import ActivationsConfig
from adalora_dist.io.errors import UserError


class CompileConfig(ActivationsConfig):
    compile: bool = False
    """Train with transformer blocks that torch.compile has built, from the second step on: losses are the same up to
    rounding. Building takes a minute or so, and once more after the freeze where pruned triplets leave memory."""
    pack_adapters: bool = True
    """Under FSDP2 and ZeRO-3 let the engine have the adapters of a block (adalora, lora) as one parameter: it works as
    much for each, however small. Not with compile, whose blocks have them one by one."""

    @model_validator(mode="after")
    def _recomputes_what_compiles(self) -> CompileConfig:
        for name, refused in (("checkpoint_activations", "selective"), ("offload_activations", True)):
            if self.compile and getattr(self, name) == refused:
                raise ValueError(
                    f"compile true with {name} {refused}: a compiled block cannot do that; leave {name} out, or set "
                    "compile to false"
                )
        return self


def check_compile(run: Any) -> None:
    """Rules over settings of several sections.

    Args:
        run: the ``RunConfig``.

    Raises:
        ValueError: one line with the settings, the rule and the remedy.
    """
    method, quantization = run.adapter.method, run.quantization.quantization
    if not run.train.compile:
        return
    if quantization != "none":
        reason = "bitsandbytes' kernels break a compiled block"
        if quantization == "fp8":
            reason = "a compiled block may keep the expanded weights until backward, which nobody has counted"
        raise ValueError(
            f"compile true with quantization {quantization}: {reason}; set compile to false, or quantization to none"
        )
    if not run.adapter.compiles:
        raise ValueError(
            f"compile true with method {method}: its layers measure or draw within a forward, which breaks a compiled "
            "block; set compile to false, or method to adalora"
        )


def check_compile_engine(compile: bool, use_deepspeed: bool) -> None:
    """Raise where the engine does what no compiled block can have in it.

    Raises:
        UserError: it is DeepSpeed.
    """
    if compile and use_deepspeed:
        raise UserError(
            "compile true under DeepSpeed: it gathers weights and reduces gradients by hooks within a block; set "
            "compile to false, or launch with DDP or FSDP2"
        )
