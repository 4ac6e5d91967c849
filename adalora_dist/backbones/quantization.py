"""4-bit and 8-bit backbones: how they are loaded, and on which engine they can be trained.

bitsandbytes, or torchao for float8, replaces the linear maps of the backbone as transformers loads it; embeddings,
norms and the output head stay as they are, and so does every module that is trained in full. The adapters sit around
the replaced modules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from adalora_dist.backbones.float8 import Float8Linear, torchao_config
from adalora_dist.backbones.precision import computed_in
from adalora_dist.config.engines import ENGINES
from adalora_dist.config.sections import QuantizationConfig, RunConfig
from adalora_dist.io.errors import UserError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, TorchAoConfig

METHODS = ("nf4", "fp4", "int8", "fp8")
REFUSED = {
    ("int8", "fsdp2"): "bitsandbytes keeps int8 scales on parameter objects, which FSDP2 replaces",
    ("int8", "zero3"): "bitsandbytes keeps the whole int8 weights beside the partitioned ones, so none would be saved",
}
"""(method, engine) that cannot work, and why. Every other combination is tested, see ``support_table``."""

# Modules after the backbone, by the names that transformers gives them.
_HEADS = ("lm_head", "embed_out", "classifier", "score", "qa_outputs", "pooler")
_COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Quantization(NamedTuple):
    """How the linear maps of a backbone are loaded."""

    loading: BitsAndBytesConfig | TorchAoConfig
    """What ``from_pretrained`` takes as ``quantization_config``."""
    compute: torch.dtype
    """What forward and backward compute in."""

    @property
    def is_float8(self) -> bool:
        return not hasattr(self.loading, "load_in_4bit")


def quantization_of(config: RunConfig, engine: str) -> Quantization | None:
    """None for a backbone that stays as its files say.

    Args:
        engine: as :func:`adalora_dist.training.engine.engine_name` calls it.

    Raises:
        UserError: bitsandbytes or torchao is not installed, or this engine cannot hold, or cannot shard, such weights.
    """
    settings = config.quantization
    method = settings.quantization
    if method == "none":
        return None
    # A list replaces transformers' own finding of the output head.
    skipped = [*_HEADS, *config.adapter.train_modules] if config.adapter.train_modules else None
    compute = _COMPUTE[computed_in(config.train.precision)]
    if method == "fp8":
        check_engine(settings, engine)
        return Quantization(torchao_config(skipped), compute)
    if find_spec("bitsandbytes") is None:
        raise UserError(f"quantization={method} needs bitsandbytes: pip install 'adalora-dist[quant]'")
    check_engine(settings, engine)
    from transformers import BitsAndBytesConfig

    if method == "int8":
        return Quantization(BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped), compute)
    storage = compute if settings.quant_storage == "auto" else getattr(torch, settings.quant_storage)
    loading = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=compute,
        # Packed bytes in the type that the engine computes in: whatever it casts its parameters to, these stay.
        bnb_4bit_quant_storage=storage,
        llm_int8_skip_modules=skipped,
    )
    return Quantization(loading, compute)


def check_engine(settings: QuantizationConfig, engine: str) -> None:
    """
    Raises:
        UserError: this engine cannot hold, or cannot shard, such weights.
    """
    method = settings.quantization
    if reason := REFUSED.get((method, engine)):
        raise UserError(
            f"quantization={method} with {engine}: {reason}; use quantization nf4, or ddp or zero2 for {method}"
        )
    if method != "none" and settings.quant_storage == "uint8" and engine == "fsdp2":
        raise UserError(
            "quant_storage=uint8 with fsdp2: accelerate leaves integer weights whole on every process; use "
            "quant_storage auto"
        )


def settle_quantized(model: nn.Module) -> None:
    """Make the quantised linears of a freshly loaded model fit for training under an engine that shards them.

    bitsandbytes' own autograd functions hold on to what they computed with, out of reach of the engine and of
    gradient checkpointing: the gathered 4-bit weights under ZeRO-3, the input with int8. :class:`_FrozenLinear` keeps
    nothing. On CPUs with AVX512-BF16 they also repack a weight at its first evaluation, into a form without gradients
    and with bf16 scales: turned off. Each remembers its name, whatever is put around it later.
    """
    for name, module in quantized_linears(model):
        module.plain_name = name
        module.support_avx512bf16_for_cpu = False
        module.forward = partial(_forward, module)


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    apply: Callable[..., torch.Tensor] = _FrozenLinear.apply
    return apply(x, module)


class _FrozenLinear(torch.autograd.Function):
    """y = base(x) and dx = dy W, with W dequantised twice and read from the module, as the engine has it by then."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: Any) -> torch.Tensor:
        ctx.module = module
        y: torch.Tensor = type(module).forward(module, x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        [grad] = grads
        compute = getattr(ctx.module, "compute_dtype", None) or grad.dtype
        return (grad.to(compute) @ dequantized(ctx.module).to(compute)).to(grad.dtype), None


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every quantised linear map, under the name that it has in the plain backbone."""
    kinds: tuple[type, ...] = (Float8Linear,)
    if "bitsandbytes" in sys.modules:  # which no module without it can be of
        from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

        kinds += (Linear4bit, Linear8bitLt)
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield getattr(module, "plain_name", name), module


def dequantized(module: Any) -> torch.Tensor:
    """The weight (d_out, d_in) that a quantised linear, whole on this process at the moment, stands for."""
    if isinstance(module, Float8Linear):
        return module.expanded()
    from bitsandbytes import functional

    if hasattr(module, "quant_state"):
        weight: torch.Tensor = functional.dequantize_4bit(module.weight.data, module.quant_state)
    else:
        state = module.state if module.state.CB is not None else module.weight
        weight = functional.int8_vectorwise_dequant(state.CB, state.SCB)
    return weight


def support_table() -> str:
    """Markdown: what works on which engine. The docs hold it, tests/backbones/test_quantization.py runs every cell."""
    rows = [("", *ENGINES), ("---", *("---" for _ in ENGINES))]
    rows += [(m, *("no" if (m, e) in REFUSED else "yes" for e in ENGINES)) for m in METHODS]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    reasons = [f"- {method} with {engine}: {reason}." for (method, engine), reason in REFUSED.items()]
    return "\n".join([*lines, "", *reasons])
