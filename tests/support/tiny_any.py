"""Any architecture of transformers, tiny: its configuration shrunk by the names and meanings of its fields."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig

VOCABULARY = 64
_SMALL: list[tuple[str, int]] = [
    (r"(text_|decoder_|encoder_)?vocab_size|vocab_size_per_layer_input", VOCABULARY),
    (r".*(num|n)_?(hidden_)?layers?(_.*)?|n_layers?|(encoder|decoder)_layers|num_decoder_layers|num_blocks|depth", 2),
    (r"num_key_value_heads|num_kv_heads|multi_query_group_num|n_head_kv|num_global_key_value_heads", 2),
    (r".*(num|n)_?.*heads?|.*attention_heads|n_head|encoder_attention_heads", 4),
    (r".*head_dim|d_kv|kv_channels|qk_rope_head_dim|qk_nope_head_dim|v_head_dim|attention_head_size|rotary_dim", 8),
    (r"(q|kv|o)_lora_rank", 8),
    (r"num_experts_per_(tok|token)|moe_topk|moe_k|top_k|moe_top_k|num_selected_experts", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r".*(num|n)_?(local_|routed_)?experts|moe_num_experts", 4),
    (r"first_k_dense_replace|num_dense_layers|n_shared_experts|num_shared_experts", 1),
    (r".*(intermediate|ffn|ff|inner|mlp)_?(size|dim|hidden_size|hidden_dim)|d_ff|d_inner|n_inner|.*ffn_dim"
     r"|hidden_dim", 48),
    (r"hidden_size|d_model|n_embd|.*embed_dim|embedding_size|emb_dim|dim|model_dim|hidden_width|attention_hidden_size"
     r"|word_embed_proj_dim|pooler_hidden_size|d_embed|hidden_size_per_layer_input|embedding_dim|lru_width", 32),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|.*_max_position.*", 64),
    (r"(mamba_|ssm_)?(d_state|state_size)|ssm_state_size|mamba_n_groups|n_groups", 4),
    (r"image_size", 16),
    (r"patch_size|spatial_patch_size", 8),
]  # fmt: skip
_IDS = re.compile(r".*_token_id|.*_id|.*token_index|.*token_ids")


class CannotBeTiny(Exception):
    """Why a model is not made."""


def tiny_config(kind: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    """A configuration of the class with two small layers.

    Raises:
        CannotBeTiny: the class does not take the values.
    """
    try:
        default = kind()
    except Exception as error:  # noqa: BLE001
        raise CannotBeTiny(f"{kind.__name__}() fails: {_line(error)}") from error
    values = shrunk(default.to_dict())
    for name in getattr(kind, "sub_configs", {}):
        sub = getattr(default, name, None)
        if isinstance(sub, PretrainedConfig):
            values[name] = shrunk(sub.to_dict())
    try:
        return kind(**{**values, **changes})
    except Exception as error:  # noqa: BLE001
        raise CannotBeTiny(f"{kind.__name__} takes no small values: {_line(error)}") from error


def shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers that are sizes made small, ids kept within the vocabulary, lists of one entry a layer cut to two."""
    small: dict[str, Any] = {}
    num_layers = next((values[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if n in values), None)
    for name, value in copy.deepcopy(values).items():
        if name in ("transformers_version", "architectures", "dtype", "_name_or_path"):
            continue
        if isinstance(value, bool):
            small[name] = value
        elif isinstance(value, int) and _IDS.fullmatch(name):
            small[name] = min(value, VOCABULARY - 1) if value >= 0 else value
        elif isinstance(value, int):
            small[name] = next((min(n, value) for rule, n in _SMALL if value > 0 and re.fullmatch(rule, name)), value)
        elif isinstance(value, list) and num_layers and len(value) == num_layers:
            small[name] = _two_of(value)
        elif isinstance(value, list) and value and all(isinstance(x, int) for x in value) and _IDS.fullmatch(name):
            small[name] = [min(x, VOCABULARY - 1) for x in value]
        else:
            small[name] = value
    if "kv_lora_rank" in small and "num_key_value_heads" in small:  # latent attention has as many of each
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _two_of(layers: list[Any]) -> list[Any]:
    """Two entries, of different kinds where there are any."""
    other = next((x for x in layers if x != layers[0]), layers[-1])
    return [layers[0], other]


def tiny_model(model_class: type[PreTrainedModel], **changes: Any) -> PreTrainedModel:
    """The class with random weights that are always the same.

    Raises:
        CannotBeTiny: it cannot be made of a small configuration, or only with more than five million weights.
    """
    config = tiny_config(model_class.config_class, **changes)
    config.use_cache = False
    for settings in (config, *[v for v in vars(config).values() if isinstance(v, PretrainedConfig)]):
        if getattr(settings, "pad_token_id", 0) is None:
            settings.pad_token_id = 0
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
        if size > 5_000_000:
            raise CannotBeTiny(f"{size:,} weights at least")
        torch.manual_seed(0)
        return model_class(config).eval()
    except CannotBeTiny:
        raise
    except Exception as error:  # noqa: BLE001
        raise CannotBeTiny(_line(error)) from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
