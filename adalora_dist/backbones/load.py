"""Load the backbone and its tokenizer, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import nn

from adalora_dist.backbones.fit import fit_tokenizer
from adalora_dist.backbones.quantization import settle_quantized
from adalora_dist.backbones.sharded_load import load_on_meta
from adalora_dist.config.sections import ModelConfig
from adalora_dist.io.errors import UserError
from adalora_dist.sharding.tensors import full_numel

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_backbone(
    config: ModelConfig,
    auto_class: Any,
    quantization: BitsAndBytesConfig | None = None,
    changes: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pre-trained model, safetensors only unless ``allow_pickle_weights``, and its tokenizer.

    Under FSDP2 its weights are on the meta device: :func:`adalora_dist.training.prepared.prepare` has each process read
    its own rows. Under ZeRO-3 they are partitioned already. A model that is being quantised, or may be pickled, is
    read whole by every process and sharded by ``prepare``.

    Args:
        auto_class: ``AutoModelForCausalLM`` or a sibling.
        quantization: from :func:`adalora_dist.backbones.quantization.bitsandbytes_config`.
        changes: to the model's own configuration, ``{"num_labels": 3}`` for instance.

    Raises:
        UserError: the model cannot be found or loaded, or quantised, it has no tokenizer, or another model's, or is
            an adapter.
    """
    from transformers import AutoConfig

    if (Path(config.name) / "adapter_config.json").is_file():
        raise UserError(
            f"model={config.name!r} is an adapter of PEFT: give the model that it belongs to, and the adapter as "
            "init_from"
        )
    tokenizer = load_tokenizer(config)
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    extra: dict[str, Any] = (
        {} if config.attn_implementation == "auto" else {"attn_implementation": config.attn_implementation}
    )
    pickles = config.allow_pickle_weights
    try:
        own = AutoConfig.from_pretrained(config.name, **options)
        is_quantized = hasattr(own, "quantization_config")
        if changes:
            for key, value in changes.items():
                setattr(own, key, value)
            extra["config"] = own
        options |= {"dtype": config.dtype, "use_safetensors": None if pickles else True, **extra}
        if quantization is not None:
            if is_quantized:
                raise UserError(
                    f"model={config.name!r} is quantised already: give the original model, or leave out quantization"
                )
            options["quantization_config"] = quantization
        if _under_fsdp2() and not is_quantized and quantization is None and not pickles:
            model = load_on_meta(auto_class, config.name, **options)
        else:
            model = auto_class.from_pretrained(config.name, **options)
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_be_loaded(config, error) from error
    except RuntimeError as error:
        if quantization is None:
            raise
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"model={config.name!r} cannot be quantised ({reason} ...): where a matrix does not fill whole elements of "
            "quant_storage ('must be divisible' in the report above) set quant_storage to uint8"
        ) from error
    if quantization is not None:
        settle_quantized(model)
    model.config.use_cache = False
    _name_blocks(model)
    fit_tokenizer(model, tokenizer)
    return model, tokenizer


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the backbone.

    Raises:
        UserError: it cannot be found or loaded, or code from elsewhere would be run.
    """
    from transformers import AutoTokenizer

    try:
        refuse_code_from_elsewhere(config)
        # Never left open: transformers would ask whoever sits at the terminal whether to run the repository's code.
        return AutoTokenizer.from_pretrained(
            config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_be_loaded(config, error) from error


def refuse_code_from_elsewhere(config: ModelConfig) -> None:
    """Raise a ``UserError`` if code would be run that ``revision`` does not pin.

    A repository may name classes of another one, REPOSITORY--module.Class, of which transformers takes the main branch.
    """
    if not config.trust_remote_code:
        return
    from transformers import PretrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    own, _ = PretrainedConfig.get_config_dict(config.name, revision=config.revision)
    for settings in (own, get_tokenizer_config(config.name, revision=config.revision)):
        named: Any = settings.get("auto_map", {})
        for classes in named.values() if isinstance(named, Mapping) else [named]:
            for name in classes if isinstance(classes, list | tuple) else [classes]:
                repository, mark, _ = str(name).partition("--")
                if mark and repository != config.name:
                    raise UserError(
                        f"trust_remote_code true, but model={config.name!r} names code of another repository, {name}, "
                        "which revision does not pin: copy that code into a repository of your own and name it there"
                    )


def _cannot_be_loaded(config: ModelConfig, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(
        f"model={config.name!r} cannot be loaded ({reason}): give a folder that save_pretrained wrote, or a Hub id "
        "that this machine can reach"
    )


def _name_blocks(model: PreTrainedModel) -> None:
    """Name the layers that FSDP2 gathers one by one, where the model class does not (DeBERTa: DebertaV2Layer).

    BERT names what its embeddings lie in as well. accelerate shards input embeddings by themselves, and torch refuses
    to do that inside a module that has been sharded before.
    """
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    embeddings = model.get_input_embeddings()
    around = {type(m).__name__ for m in model.modules() if m is not embeddings and embeddings in m.modules()}
    blocks = set(model._no_split_modules or ()) - around
    if not blocks and stacks:
        largest = max(stacks, key=lambda stack: sum(full_numel(p) for p in stack.parameters()))
        blocks = {type(layer).__name__ for layer in largest}
    model._no_split_modules = blocks


def _under_fsdp2() -> bool:
    return is_initialized() and AcceleratorState().distributed_type == DistributedType.FSDP


def dtype_named(name: str) -> torch.dtype | None:
    """torch's type of a configuration value; None for auto."""
    return None if name == "auto" else getattr(torch, name)
