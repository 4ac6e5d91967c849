"""A model that somebody else has loaded: where its tensors lie in its files, and whether the files would make it again.

An adapter and a merged model say no more than what is added to the base's *files*. So whatever a model in memory has
beyond them, such as embeddings with rows for new tokens, or a new head that is not trained, is lost with it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from adalora_dist.backbones.files import stored_tensors, weight_files
from adalora_dist.backbones.names import FileNames
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import read_object
from adalora_dist.sharding.tensors import is_whole

logger = logging.getLogger(__name__)

_WITHOUT_EFFECT = re.compile(
    r"_.*|.*(dtype|drop|token_id|cache|name_or_path|_version|checkpoint).*|architectures|id2label|label2id|num_labels"
    r"|problem_type|output_\w+|return_dict|vocab_size|.*_config"
)
"""Settings that leave the function of a trained model alone, or belong to its task, or are looked at otherwise."""
_ROUNDED = 2**-7
"""What half precision makes of a row, and more, of its length."""


def note_files(model: nn.Module) -> None:
    """Have a plain model of transformers' know its files (``file_names``), where they are here and whole.

    Nothing is done to a model of whose files nothing can be said: made from a configuration, read from pickled weights,
    quantised, sharded already. No network is asked. Values and settings that are not those of the files are warned of.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or hasattr(model, "file_names") or hasattr(model, "hf_quantizer"):
        return
    folder = _folder_of(model)
    if folder is None or not all(is_whole(p) and not p.is_meta for p in model.parameters()):
        return
    try:
        stored = stored_tensors(weight_files(folder))
    except UserError:  # other weights than were loaded, since
        return
    if not stored:
        return
    names = FileNames.of(model, stored)
    model.file_names = names  # type: ignore[assignment]
    if settings := _changed_settings(model.config, folder):
        logger.warning(
            "the model was loaded with %s, and config.json of %s says otherwise: a merged model, and the base that an "
            "adapter is put on, are as that says; write the model with save_pretrained and load that",
            ", ".join(f"{name}={value!r:.60}" for name, value in settings.items()), folder,
        )  # fmt: skip
    if changed := next(_changed(model, names), None):
        logger.warning(
            "%s has other values than its files (%s), to which an adapter or a merged model adds: if the model was "
            "changed after it was loaded, as a merge does, write it with save_pretrained and load that",
            changed, folder,
        )  # fmt: skip


def refuse_lost_parts(model: nn.Module, adapted: Collection[str], trained: Collection[str]) -> None:
    """Raise if ``model`` has parts that are neither in its files nor in what will be written.

    Args:
        model: with adapters. Without ``file_names`` nothing is known about its files, and nothing is checked.
        adapted: names of the weights that adapters lie around.
        trained: names of the parameters that are trained in full.

    Raises:
        UserError: see above.
    """
    names: FileNames | None = getattr(model, "file_names", None)
    if names is None:
        return
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    for name in names.missing:
        if name in names.mismatched and name in tables:
            size = " x ".join(map(str, names.mismatched[name]))
            raise UserError(
                f"{name} has another size in the model than in its files ({size}), which an adapter is loaded around: "
                "after resize_token_embeddings write the model with save_pretrained, and load that"
            )
    if random := [name for name in names.missing if name not in trained]:
        matrices = [name for name in random if name in adapted]
        also = f", leave {matrices[0].rpartition('.')[0]} out of targets" if matrices else ""
        raise UserError(
            f"the backbone's files lack {len(random)} frozen parameters ({', '.join(random[:3])}), which would stay "
            f"random: add their modules to train_modules{also}, or use files that have them"
        )


def _folder_of(model: Any) -> Path | None:
    """Where the files of a loaded model are on this machine: its folder, or the snapshot in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    name = getattr(model.config, "_name_or_path", "")
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        config = try_to_load_from_cache(name, "config.json", revision=getattr(model.config, "_commit_hash", None))
    except ValueError:  # no name on the Hub
        return None
    return Path(config).parent if isinstance(config, str) else None


def _changed_settings(config: Any, folder: Path) -> dict[str, Any]:
    """What a model's configuration says of its function, and its config.json does not."""
    own = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    if own.get("model_type") != config.model_type:
        return {}
    stored, here = type(config).from_pretrained(folder).to_dict(), config.to_dict()
    differ = (name for name in sorted(here) if here[name] != stored.get(name))
    return {name: here[name] for name in differ if not _WITHOUT_EFFECT.fullmatch(name)}


def _changed(model: nn.Module, names: FileNames) -> Iterator[str]:
    """Parameters whose first row is not that of the files, beyond what a change of the type rounds."""
    by_file: dict[Path, list[tuple[str, torch.Tensor, str]]] = {}
    for name, own in model.named_parameters():
        if own.ndim and own.is_floating_point() and name not in names.computed and name not in names.missing:
            source = names.sources[name][0]
            by_file.setdefault(source.file, []).append((name, own[:1], source.key))
    for path, rows in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name, first, key in rows:
                row, here = file.get_slice(key)[:1].float(), first.detach().float().cpu()
                if torch.linalg.vector_norm(here - row) > _ROUNDED * torch.linalg.vector_norm(row):
                    yield name
