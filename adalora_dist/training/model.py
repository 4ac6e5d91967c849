"""Load the backbone and its tokenizer, with errors that say what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adalora_dist.config import ModelConfig
from adalora_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_backbone(config: ModelConfig, auto_class: type) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pre-trained model, safetensors only, and its tokenizer.

    Args:
        auto_class: ``AutoModelForCausalLM`` or a sibling.

    Raises:
        UserError: the model cannot be found or loaded, or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    extra = {} if config.attn_implementation == "auto" else {"attn_implementation": config.attn_implementation}
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.name, **options)
        model = auto_class.from_pretrained(config.name, dtype=config.dtype, use_safetensors=True, **options, **extra)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model={config.name!r} cannot be loaded ({reason}): give a folder that save_pretrained wrote, or a Hub id "
            "that this machine can reach"
        ) from error
    model.config.use_cache = False
    return model, tokenizer


def dtype_named(name: str) -> torch.dtype | None:
    """torch's type of a configuration value; None for auto."""
    return None if name == "auto" else getattr(torch, name)
