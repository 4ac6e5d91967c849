"""What the weights of a quantised backbone stand for, computed again from its files, to merge adapters into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adalora_dist.backbones.float8 import Float8Linear, check_torchao, rounded
from adalora_dist.backbones.quantization import quantized_linears
from adalora_dist.config.sections import RunConfig
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import read_object


@dataclass(frozen=True)
class QuantizedWeight:
    """What a backbone's weight becomes by quantisation, computed again from its file: a function of the tensor there.

    Works on any process of any engine, because it needs none of the weights that the engine has taken over.
    """

    shape: tuple[int, int]
    """Of the tensor in the file."""
    is_transposed: bool
    """Whether the file has (d_in, d_out), as transformers' Conv1D."""
    method: str
    double_quant: bool
    dtype: torch.dtype
    """In which the backbone was loaded, and so quantised."""
    device: torch.device
    """Where it was quantised; kernels of other devices may round differently."""

    def __call__(self, stored: torch.Tensor) -> torch.Tensor:
        weight = (stored.T if self.is_transposed else stored).to(self.device, self.dtype).contiguous()
        if self.method == "fp8":
            return rounded(weight).cpu()
        from bitsandbytes import functional

        if self.method == "int8":
            codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
            weight = functional.int8_vectorwise_dequant(codes, scales)
        else:
            packed, state = functional.quantize_4bit(
                weight, quant_type=self.method, compress_statistics=self.double_quant
            )
            state.dtype = torch.float32
            weight = functional.dequantize_4bit(packed, state)
        return (weight.T if self.is_transposed else weight).float().cpu()


def quantized_weights(model: nn.Module, config: RunConfig) -> dict[str, QuantizedWeight]:
    """By parameter name in the backbone's files, for ``merge(..., base_weights=...)``. No collective."""
    found = {}
    for name, module in quantized_linears(model):
        is_transposed = module.source_cls.__name__ == "Conv1D"
        shape = (module.in_features, module.out_features)
        if isinstance(module, Float8Linear):
            dtype, device = module.loaded_dtype, module.quantized_on
        else:
            state = getattr(module, "quant_state", None)
            dtype = torch.float16 if state is None else state.dtype
            device = next(module.parameters()).device
        found[f"{name}.weight"] = QuantizedWeight(
            shape if is_transposed else shape[::-1],
            is_transposed,
            config.quantization.quantization,
            config.quantization.double_quant,
            dtype,
            device,
        )
    return found


def quantization_record(weights: Mapping[str, QuantizedWeight]) -> dict[str, Any]:
    """What a run folder keeps of them as quantized.json, so that a later merge can use them, too."""
    return {n: asdict(w) | {"dtype": str(w.dtype), "device": w.device.type} for n, w in weights.items()}


def read_quantization_record(file: Path) -> dict[str, QuantizedWeight]:
    """The weights of a quantized.json. Computed on its kind of device, and so only where there is one.

    Raises:
        UserError: the file is not there or incomplete, or it needs a device, or torchao, that this machine lacks.
    """
    try:
        described = read_object(file)
        weights = {
            name: QuantizedWeight(
                (int(entry["shape"][0]), int(entry["shape"][1])),
                bool(entry["is_transposed"]),
                str(entry["method"]),
                bool(entry["double_quant"]),
                {str(t): t for t in (torch.float32, torch.bfloat16, torch.float16)}[entry["dtype"]],
                torch.device(entry["device"]),
            )
            for name, entry in described.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        reason = error if isinstance(error, UserError) else repr(error)
        raise UserError(
            f"{file} does not say how the run's backbone was quantised ({reason}): merge into original"
        ) from error
    if any(w.method == "fp8" for w in weights.values()):
        check_torchao()
    if any(w.device.type == "cuda" for w in weights.values()) and not torch.cuda.is_available():
        raise UserError(
            f"{file}: the backbone was quantised on a GPU, and a CPU may round differently: merge on a machine with "
            "one, or merge into original"
        )
    return weights
