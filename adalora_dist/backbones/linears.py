"""What counts as a linear map, and how its files have the weight: asked here only."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from adalora_dist.backbones.float8 import Float8Linear
from adalora_dist.backbones.quantization import dequantized
from adalora_dist.sharding.tensors import full_shape


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear map, or None. Quantised linears derive from nn.Linear or carry its attributes."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return cast(int, module.in_features), cast(int, module.out_features)
    if hasattr(module, "nf") and hasattr(module, "nx"):  # transformers' Conv1D, weight (d_in, d_out)
        return cast(int, module.nx), cast(int, module.nf)
    return None


def norm_width(module: nn.Module) -> int | None:
    """How many numbers a normalisation layer reads; None: the module has no vector of weights."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or linear_shape(module) is not None or len(full_shape(weight)) != 1:
        return None
    return full_shape(weight)[0]


def is_conv1d(base: nn.Module) -> bool:
    """Whether the files have the weight as (d_in, d_out). A quantised linear remembers what it has replaced."""
    return hasattr(base, "nf") or getattr(base, "source_cls", type(base)).__name__ == "Conv1D"


def is_packed(module: nn.Module) -> bool:
    """Whether the weight is packed, so that nothing can be added to it in place."""
    return hasattr(module, "quant_state") or isinstance(module, Float8Linear)


def has_readable_weight(module: nn.Module) -> bool:
    """Whether :func:`weight_of` knows how a linear map holds its weight; no matter whether it is whole here now."""
    weight = getattr(module, "weight", None)
    if isinstance(module, Float8Linear):
        return True
    if hasattr(module, "quant_state"):
        return type(module).__module__.startswith("bitsandbytes")
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.element_size() == 1:
        return False
    return len(full_shape(weight)) == 2


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight (d_out, d_in), detached, of a linear map that is whole on this process now, dequantised if need be.

    Engines have it so while the map computes: ask from a forward pre-hook of it.
    """
    if is_packed(module):
        return dequantized(module)
    weight = cast(torch.Tensor, module.weight).detach()
    return weight.T if is_conv1d(module) else weight


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module with the attributes of a linear map computes one, W x + b, and can have an update added to W.

    Routers derive from ``nn.Linear`` and return several tensors, stacks of experts name their features alike and hold
    3-D weights. Falcon's own linear is one. Asked of a small copy of the weights, so that those of the model may be on
    meta, or partitioned. Quantised linears are taken at their word.
    """
    kind: Any = type(module)
    if kind.forward in (nn.Linear.forward, _conv1d_forward()) or list(module.children()):
        return linear_shape(module) is not None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.element_size() == 1:
        return True
    shape: Any = tuple(full_shape(weight))
    if kind.__module__.startswith("bitsandbytes") or shape[1:] == (1,):  # packed, in the type of its storage
        return True
    if len(shape) != 2:
        return False
    d_in, d_out = 3, 5
    x, matrix, bias = torch.randn(4, d_in), torch.randn(d_out, d_in), torch.randn(d_out)
    if getattr(module, "bias", None) is None:
        bias = torch.zeros(d_out)
    small: Any = object.__new__(kind)  # without the hooks that an engine has put on the module
    small.__dict__.update(module.__dict__)
    own = {"weight": matrix.T if is_conv1d(module) else matrix, "bias": bias}
    small._parameters = {name: nn.Parameter(own[name]) if value is not None and name in own else value
                         for name, value in module._parameters.items()}  # fmt: skip
    expected = torch.nn.functional.linear(x, matrix, bias)
    try:
        with torch.no_grad():
            y = kind.forward(small, x)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    return isinstance(y, torch.Tensor) and y.shape == expected.shape and torch.allclose(y, expected, atol=1e-5)


def _conv1d_forward() -> Any:
    from transformers.pytorch_utils import Conv1D

    return Conv1D.forward
