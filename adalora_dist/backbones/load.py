"""Load the backbone and its tokenizer, with errors that say what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch import nn

from adalora_dist.backbones.experts import unlike_linears
from adalora_dist.backbones.files import locate_weights, refuse_odd_files, refuse_odd_sizes, stored_tensors
from adalora_dist.backbones.fit import compare_classes, fit_tokenizer
from adalora_dist.backbones.float8 import pack_float8
from adalora_dist.backbones.linears import is_conv1d, is_plain_linear
from adalora_dist.backbones.names import FileNames, head_prefixes, on_meta
from adalora_dist.backbones.parts import input_embeddings
from adalora_dist.backbones.quantization import Quantization, settle_quantized
from adalora_dist.backbones.sharded_load import load_on_meta
from adalora_dist.backbones.ties import refuse_unequal
from adalora_dist.backbones.tokenizer import knows_words, remember_rules
from adalora_dist.config.sections import ModelConfig
from adalora_dist.io.digest import digest_of
from adalora_dist.io.errors import UserError, reason_of
from adalora_dist.io.foreign_files import read_bytes
from adalora_dist.sharding.tensors import full_numel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_backbone(
    config: ModelConfig,
    auto_class: Any,
    quantization: Quantization | None = None,
    changes: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pre-trained model, safetensors only unless ``allow_pickle_weights``, and its tokenizer.

    Under FSDP2 its weights are on the meta device: :func:`adalora_dist.training.prepared.prepare` has each process read
    its own rows. Under ZeRO-3 they are partitioned already. A model that is being quantised, or may be pickled, is
    read whole by every process and sharded by ``prepare``.

    Its attribute ``file_names``, of :class:`adalora_dist.backbones.names.FileNames`, says where its tensors lie in the
    files, and which of them are new: a head in other sizes than the files have is new, too.

    Args:
        auto_class: ``AutoModelForCausalLM`` or a sibling.
        quantization: from :func:`adalora_dist.backbones.quantization.quantization_of`.
        changes: to the model's own configuration, ``{"num_labels": 3}`` for instance.

    Raises:
        UserError: the model cannot be found or loaded, or quantised, it has no tokenizer, or another model's, is an
            adapter, or its files belong to another model than its config.json.
    """
    from transformers import AutoConfig
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if Path(config.name).is_dir():
        refuse_odd_files(Path(config.name))
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
        refuse_odd_sizes(config.name, own.to_dict())
        is_quantized, classes = hasattr(own, "quantization_config"), dict(getattr(own, "id2label", None) or {})
        if changes:
            for key, value in changes.items():
                setattr(own, key, value)
            extra["config"] = own
        options |= {"dtype": config.dtype, "use_safetensors": None if pickles else True, **extra}
        names = _names_in_files(config, auto_class, own)
        options["ignore_mismatched_sizes"] = True  # of heads alone: anything else is refused
        if names is not None and names.mismatched and is_deepspeed_zero3_enabled():
            # There transformers does not ignore a size. It passes by a name that no module has.
            options["key_mapping"] = {
                f"^{re.escape(names.sources[name][0].key)}$": f"of_another_size.{name}" for name in names.mismatched
            }
        if quantization is not None:
            if is_quantized:
                raise UserError(
                    f"model={config.name!r} is quantised already: give the original model, or leave out quantization"
                )
            plain = on_meta(auto_class, own, trust_remote_code=config.trust_remote_code)
            if left := next(unlike_linears(plain), None):
                raise UserError(
                    f"model={config.name!r} keeps its experts in parameters like {left}, which quantisation leaves as "
                    "they are: leave quantization at none, and shard with FSDP2 or ZeRO-3"
                )
            options["quantization_config"] = quantization.loading
            if quantization.is_float8:
                _refuse_unlike(plain, config.name)
                # Quantised there tensor by tensor, as bitsandbytes does by itself. ZeRO-3 may not be told where.
                if is_initialized() and not is_deepspeed_zero3_enabled():
                    options["device_map"] = {"": AcceleratorState().device}
        if names is not None and _under_fsdp2() and not is_quantized and quantization is None and not pickles:
            model = load_on_meta(auto_class, config.name, names, **options)
        else:
            model, report = auto_class.from_pretrained(config.name, output_loading_info=True, **options)
            if names is None:
                names = FileNames.without_headers(model, report)
                _refuse_other_weights(config, model, names)
            elif is_quantized:  # packed: only the one that loads it knows what its shapes mean
                loaded = FileNames.without_headers(model, report)
                names = replace(names, missing=loaded.missing, mismatched=loaded.mismatched)
    except UserError:
        raise
    except Exception as error:  # an odd value in somebody's files: TypeError, KeyError, ZeroDivisionError, anything
        if quantization is None or not isinstance(error, RuntimeError):
            raise _cannot_be_loaded(config, error) from error
        raise UserError(
            f"model={config.name!r} cannot be quantised ({reason_of(error, 150)} ...): where a matrix does not fill "
            "whole elements of quant_storage ('must be divisible' in the report above) set quant_storage to uint8"
        ) from error
    if quantization is not None:
        pack_float8(model, quantization.compute)
        settle_quantized(model)
    model.config.use_cache = False
    model.file_names = names  # type: ignore[assignment]
    name_blocks(model)
    fit_tokenizer(model, tokenizer)
    if not any(name.startswith(head_prefixes(model)) for name in names.missing):
        compare_classes(classes, (changes or {}).get("id2label", classes))
    return model, tokenizer


def _refuse_unlike(plain: nn.Module, name: str) -> None:
    """Raise for a backbone of which torchao would leave linear maps as they are, or quantise others and break them."""
    for at, module in plain.named_modules():
        if is_conv1d(module):
            raise UserError(
                f"quantization=fp8 with model={name!r}: {at} is a {type(module).__name__}, which torchao leaves as it "
                "is; use quantization nf4"
            )
        if isinstance(module, nn.Linear) and not is_plain_linear(module):
            raise UserError(
                f"quantization=fp8 with model={name!r}: {at} is a {type(module).__name__}, which computes more than a "
                "product with its weight; leave quantization at none"
            )


def _names_in_files(config: ModelConfig, auto_class: Any, own: Any) -> FileNames | None:
    """Where the model's tensors lie in its files; None if those are not safetensors, and may be loaded.

    Raises:
        UserError: there are no weights that may be loaded, or they belong to another model than ``own``; as
            :func:`refuse_unequal`.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    files = locate_weights(config.name, config.revision)
    if not files:
        if not config.allow_pickle_weights:
            _refuse_other_forms(config.name)
        return None
    model = on_meta(auto_class, own, trust_remote_code=config.trust_remote_code)
    names = FileNames.of(model, stored_tensors(files))
    if not hasattr(own, "quantization_config"):
        _refuse_other_weights(config, model, names)
    if is_deepspeed_zero3_enabled():
        refuse_unequal(model, names, config.name)
    return names


def _refuse_other_forms(name: str) -> None:
    """Raise for a local folder that has weights, in a form that is not loaded here."""
    files = sorted(path.name for path in Path(name).iterdir()) if Path(name).is_dir() else []
    remedies = {
        r".*\.gguf": "give the model that it was made from, in safetensors",
        r"(pytorch_model|model).*\.(bin|pt|pth)": "save it again with save_pretrained, or set allow_pickle_weights, if "
        "you trust it",
        r".*\.(h5|msgpack|ckpt.*)": "save it from PyTorch with save_pretrained",
        r".*\.safetensors": "call it model.safetensors, or fetch the index that belongs to it",
    }
    for pattern, remedy in remedies.items():
        if found := next((file for file in files if re.fullmatch(pattern, file)), None):
            raise UserError(f"model={name!r} has no model.safetensors, but {found}: {remedy}")


def _refuse_other_weights(config: ModelConfig, model: PreTrainedModel, names: FileNames) -> None:
    """Raise if the files do not belong to the backbone that config.json describes. Heads are as the task wants them."""
    modules = dict(model.named_modules())
    # Tensors of modules that the model does not have, or of none (BART's final_logits_bias), are another task's head.
    if strange := sorted(key for key in names.unexpected if (key.rpartition(".")[0] or None) in modules):
        raise UserError(
            f"model={config.name!r}: its files have {len(strange)} tensors that {type(model).__name__} has no place "
            f"for ({', '.join(strange[:3])}): its config.json belongs to other weights; use the right one"
        )
    heads = head_prefixes(model)
    if other := sorted(name for name in names.mismatched if not name.startswith(heads)):
        name = other[0]
        raise UserError(
            f"model={config.name!r}: {name} has shape {names.mismatched[name]} in its files and "
            f"{tuple(model.get_parameter(name).shape)} by its config.json, which belongs to other weights; use the "
            "right one"
        )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the backbone.

    Raises:
        UserError: it cannot be found, loaded or used on a plain text, it has no words, or code from elsewhere would be
            run.
    """
    from transformers import AutoTokenizer

    try:
        refuse_code_from_elsewhere(config)
        # Never left open: transformers would ask whoever sits at the terminal whether to run the repository's code.
        tokenizer = AutoTokenizer.from_pretrained(
            config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        remember_rules(tokenizer)
        tokenizer("a")  # some odd values (model_max_length) are met in use alone
        has_words = knows_words(tokenizer)
    except UserError:
        raise
    except Exception as error:
        raise _cannot_be_loaded(config, error) from error
    if not has_words:  # without files transformers makes an empty one, to which every text is unknown
        raise UserError(
            f"model={config.name!r}: its {type(tokenizer).__name__} knows no word, only special tokens: its own "
            "files are not there, or transformers does not read them; put the model's tokenizer.json there"
        )
    return tokenizer


def refuse_code_from_elsewhere(config: ModelConfig) -> None:
    """Raise a ``UserError`` if code would be run that ``revision`` does not pin.

    A repository may name classes of another one, REPOSITORY--module.Class, of which transformers takes the main branch.
    A folder has no commits: there ``revision`` is a digest of the code itself.
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
    if (found := _code_digest(Path(config.name))) not in (None, config.revision):
        raise UserError(
            f"trust_remote_code true, but revision {config.revision} is not that of the code in the folder "
            f"model={config.name!r}: read its Python files, then give --revision {found}, which stands for what is in "
            "them now"
        )


def _code_digest(folder: Path) -> str | None:
    """Of the names and contents of all Python files in a folder, 40 hexadecimal digits; None: it has none."""
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else []
    parts = [(str(path.relative_to(folder)).encode(), read_bytes(path)) for path in files]
    return digest_of(b"\0".join((name, digest_of([code]).encode())) for name, code in parts)[:40] if files else None


def _cannot_be_loaded(config: ModelConfig, error: Exception) -> UserError:
    return UserError(
        f"model={config.name!r} cannot be loaded ({reason_of(error)}): give a folder that save_pretrained wrote, or a "
        "Hub id that this machine can reach"
    )


def name_blocks(model: Any) -> set[str]:
    """Name the layers that FSDP2 gathers one by one, where the model class does not (DeBERTa: DebertaV2Layer).

    Returns:
        Names of their classes, as the model has them from now on.

    BERT names what its embeddings lie in as well. accelerate shards input embeddings by themselves, and torch refuses
    to do that inside a module that has been sharded before.
    """
    # A list of lists (Funnel's) is called no more than a list is; its layers are.
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and not isinstance(m[0], type(m))]
    embeddings = input_embeddings(model)
    around = {type(m).__name__ for m in model.modules() if m is not embeddings and embeddings in m.modules()}
    blocks = set(model._no_split_modules or ()) - around
    if not blocks and stacks:
        largest = max(stacks, key=lambda stack: sum(full_numel(p) for p in stack.parameters()))
        blocks = {type(layer).__name__ for layer in largest}
    model._no_split_modules = blocks
    return blocks


def _under_fsdp2() -> bool:
    return is_initialized() and bool(AcceleratorState().distributed_type == DistributedType.FSDP)


def dtype_named(name: str) -> torch.dtype | None:
    """torch's type of a configuration value; None for auto."""
    return None if name == "auto" else getattr(torch, name)
