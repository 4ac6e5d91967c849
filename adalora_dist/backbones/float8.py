"""Frozen linear maps in float8: torchao quantises them as transformers loads them, and here they are held and computed.

torchao's own weights are tensors of a class of its own, which neither FSDP2 nor DeepSpeed can take over, and its
product keeps the expanded weight of every map until backward. So its numbers are taken out once they are loaded, and
packed into plain tensors, as bitsandbytes packs 4-bit weights.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version
from torch import nn

from adalora_dist.io.errors import UserError

if TYPE_CHECKING:
    from transformers import TorchAoConfig

_OLDEST = "0.18"
_SCALE_BYTES = 4


class Float8Linear(nn.Module):
    """y = W x + b with a frozen W (d_out, d_in) of float8_e4m3fn, and a float32 scale for each row.

    ``weight`` (n, 1) holds bytes in a type that means nothing: the scales, then W row by row, then zeros up to a whole
    element. With scales inside, an engine that shards it leaves nothing whole.
    """

    source_cls = nn.Linear
    """What it has replaced, by the name that bitsandbytes' have for it."""
    weight: nn.Parameter

    def __init__(self, base: nn.Linear, compute_dtype: torch.dtype) -> None:
        """
        Args:
            base: as torchao has left it.
            compute_dtype: what W is expanded to for each product, and the type of ``weight``.

        Raises:
            UserError: this torchao has another form of float8 weights.
        """
        super().__init__()
        self.d_out, self.d_in = self.out_features, self.in_features = base.out_features, base.in_features
        self.compute_dtype = compute_dtype
        self.loaded_dtype = base.weight.dtype
        """What W was quantised from."""
        values, scales = _parts(base.weight)
        self.quantized_on = values.device
        data = torch.cat([scales.view(torch.uint8), values.view(torch.uint8).flatten()])
        data = nn.functional.pad(data, (0, -len(data) % compute_dtype.itemsize))
        self.weight = nn.Parameter(data.view(compute_dtype)[:, None], requires_grad=False)
        self.bias = base.bias
        self.train(base.training)

    def expanded(self) -> torch.Tensor:
        """W in float32, where ``weight`` is whole on this process at the moment."""
        data = self.weight.detach().flatten().view(torch.uint8)
        scales, values, _ = data.tensor_split([end := _SCALE_BYTES * self.d_out, end + self.d_out * self.d_in])
        # Copied: in what an engine gathers, a float32 may begin where none may be seen.
        scales = scales.clone().view(torch.float32)
        return values.view(torch.float8_e4m3fn).view(self.d_out, self.d_in).float() * scales[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        y = nn.functional.linear(x.to(self.compute_dtype), self.expanded().to(self.compute_dtype), bias)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.d_in}, out_features={self.d_out}, bias={self.bias is not None}"


def torchao_config(skipped: list[str] | None) -> TorchAoConfig:
    """What ``from_pretrained`` takes, for maps but those named in ``skipped``; None: but the head.

    Raises:
        UserError: as :func:`check_torchao`.
    """
    check_torchao()
    from transformers import TorchAoConfig

    return TorchAoConfig(_weight_only(), modules_to_not_convert=skipped)


def check_torchao() -> None:
    """
    Raises:
        UserError: torchao is not installed, or too old.
    """
    try:
        found = version("torchao")
    except PackageNotFoundError:
        raise UserError("quantization=fp8 needs torchao: pip install 'adalora-dist[fp8]'") from None
    if Version(found) < Version(_OLDEST):
        raise UserError(
            f"quantization=fp8 with torchao {found}: must be {_OLDEST} or later; pip install 'adalora-dist[fp8]'"
        )


def pack_float8(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Replace every map that torchao has quantised by a :class:`Float8Linear`.

    Raises:
        UserError: this torchao has another form of float8 weights.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and hasattr(m.weight, "qdata")}
    for name, module in found.items():
        model.set_submodule(name, Float8Linear(module, compute_dtype))


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """What a weight (d_out, d_in) of the files, in the type that it was loaded in, stands for after quantisation."""
    from torchao.quantization import quantize_

    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(linear, _weight_only())
    values, scales = _parts(linear.weight)
    return values.float() * scales[:, None]


def _weight_only() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, PerRow

    # The type is named, since on AMD torchao prefers another; inductor's settings are those of the whole process.
    return Float8WeightOnlyConfig(torch.float8_e4m3fn, granularity=PerRow(), set_inductor_config=False)


def _parts(weight: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """W (d_out, d_in) in float8 and the scales (d_out,) in float32 of a weight that torchao has quantised.

    Raises:
        UserError: they are not there in these forms.
    """
    values, scales = (getattr(weight, name, torch.empty(0)) for name in ("qdata", "scale"))
    found = (values.dtype, values.shape, scales.dtype, scales.numel())
    if found != (torch.float8_e4m3fn, weight.shape, torch.float32, len(weight)):
        raise UserError(
            f"quantization=fp8 with torchao {version('torchao')}: its float8 weights are not those of {_OLDEST}, "
            f"values with a float32 scale for each row; pip install 'torchao=={_OLDEST}.*'"
        )
    values, scales = values.detach(), scales.detach().flatten()
    # torchao divides by the scale: a row of zeros is nan. In float16 a row below 1.3e-5 has a scale of 0, too.
    data = values.view(torch.uint8).masked_fill((scales == 0)[:, None], 0)
    return data.view(torch.float8_e4m3fn), scales
