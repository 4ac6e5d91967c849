"""Parts of transformer layers by the names that architectures give them: where published adapters lie."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from adalora_dist.backbones.linears import linear_shape
from adalora_dist.backbones.parts import backbone_of, is_under, tower_names
from adalora_dist.io.errors import UserError

_FEED_FORWARD = r"(mlp|ffn|feed_forward|DenseReluDense)"
_NAMES = {
    "attention output": (
        r"(self_attn|encoder_attn|attn|attention|self_attention|SelfAttention|EncDecAttention)"
        r"\.(o_proj|out_proj|c_proj|dense|out_lin|o)",
        r"(attention|crossattention)\.output\.dense",
    ),
    "feed-forward output": (
        _FEED_FORWARD + r"\.(down_proj|c_proj|dense_4h_to_h|fc2|fc_out|lin2|wo)",
        r"layers?\.\d+\.(fc2|output\.dense)",
    ),
    "feed-forward input": (
        _FEED_FORWARD + r"\.(up_proj|gate_up_proj|c_fc|dense_h_to_4h|fc1|fc_in|lin1|wi|wi_1)",
        r"layers?\.\d+\.(fc1|intermediate\.dense)",
    ),
}
"""Ends of module names, by the part. Of gated feed-forwards the input is the map that is not the gate."""

_POST_NORM = (("dense", "LayerNorm", None), ("fc2", "final_layer_norm", {"bart"}))
"""Feed-forward's output map and, beside it, the norm of (its output + residual) where a layer ends in one; for which
architectures (None: wherever the two are called so)."""


def find_parts(model: nn.Module, method: str, parts: Iterable[str]) -> list[str]:
    """Names of the linear maps of these parts, in the order of the model; towers of vision and audio are left alone,
    as by all-linear.

    Raises:
        UserError: there is none under a known name.
    """
    inside, towers = {id(module) for module in backbone_of(model).modules()}, tower_names(model)
    linears = [
        name
        for name, module in model.named_modules()
        if id(module) in inside and linear_shape(module) is not None and not is_under(name, towers)
    ]
    found = []
    for part in parts:
        pattern = re.compile(rf"(.*\.)?({'|'.join(_NAMES[part])})")
        of_part = [name for name in linears if pattern.fullmatch(name)]
        if not of_part:
            raise UserError(
                f"method={method}: the {part} maps of {type(model).__name__} have none of the names that are known "
                "here: name the matrices to adapt in positions"
            )
        found += of_part
    return [name for name in linears if name in {*found}]


def norm_behind(model: nn.Module, name: str) -> str | None:
    """The norm that a post-norm layer puts behind the output map ``name`` and the residual; None in pre-norm layers."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    parent, _, leaf = name.rpartition(".")
    beside: Any = dict(model.get_submodule(parent).named_children()) if parent else {}
    for linear, norm, kinds in _POST_NORM:
        if leaf == linear and norm in beside and (kinds is None or kind in kinds):
            return f"{parent}.{norm}"
    return None


def layer_of(name: str) -> int:
    """Number of the layer that a module lies in, from its name, within its stack; 0 outside of any."""
    found = re.search(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return int(found[1]) if found else 0
