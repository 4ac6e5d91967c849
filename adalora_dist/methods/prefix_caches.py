"""What a prefix needs of a model: its caches, and the sizes of what they hold."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, cast

from torch import nn

from adalora_dist.backbones.linears import linear_shape
from adalora_dist.backbones.parts import backbone_of
from adalora_dist.io.errors import UserError

_CACHE_ARGUMENTS = ("cache", "past_key_values")


class Heads(NamedTuple):
    """What the cache of a model holds per position."""

    num_layers: int
    num_heads: int
    """Of keys and values, which may be fewer than those of queries."""
    head_size: int

    @property
    def width(self) -> int:
        """Numbers per position: keys and values of all layers."""
        return 2 * self.num_layers * self.num_heads * self.head_size


def text_config(backbone: nn.Module) -> Any:
    """The configuration of the part that reads text; None without one."""
    config: Any = getattr(backbone, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def cache_argument(backbone: nn.Module) -> str:
    """Of its forward, the name under which it takes a cache; "": it takes none."""
    parameters = inspect.signature(type(backbone).forward).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in parameters), "")


def heads_of(model: nn.Module) -> Heads:
    """
    Raises:
        UserError: the model's caches do not serve for a prefix, with the reason.
    """
    backbone = backbone_of(model)
    if why := _unfit(backbone):
        raise UserError(
            f"method=prefix: {type(model).__name__} {why}: take another method, such as lora, or a decoder whose "
            "layers all see the whole text"
        )
    config = text_config(backbone)
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = Heads(config.num_hidden_layers, num_heads, head_size)
    widths = {
        name.rpartition(".")[2]: shape[1]
        for name, module in backbone.named_modules()
        if (shape := linear_shape(module)) is not None
    }
    own = num_heads * head_size
    separate = widths.get("k_proj") == own and widths.get("v_proj") == own
    joint = own == config.hidden_size and 3 * own in (widths.get("c_attn"), widths.get("query_key_value"))
    if not separate and not joint:
        raise UserError(
            f"method=prefix: the keys and values of {type(model).__name__} are not {num_heads} heads of {head_size} "
            "numbers, as its configuration says, or are made by maps of unknown names: take another method"
        )
    return heads


def _unfit(backbone: nn.Module) -> str:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    config = text_config(backbone)
    if config is None or not cache_argument(backbone):
        return "takes no cache"
    if config.is_encoder_decoder:
        return "has an encoder and a decoder"
    kinds = {type(layer).__name__ for layer in DynamicCache(config=cast(Any, backbone).config).layers}
    if others := kinds - {DynamicLayer.__name__}:
        return f"keeps its past in another form ({', '.join(sorted(others))})"
    causal = [module.is_causal for module in backbone.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    if not causal or not all(causal):
        return "is no causal decoder"
    return ""
