"""What a run leaves behind: the adapter alone, and a merged model that plain transformers loads.

W = W0 + s P diag(lambda) Q. Merging goes through the backbone's own safetensors files, one file at a time, so it
needs no model in memory, works the same after every engine, and leaves everything that was not adapted bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from adalora_dist.allocator import RankAllocator
from adalora_dist.errors import UserError
from adalora_dist.inject import AdaptedMatrix, linear_shape
from adalora_dist.layers import SVDLinear

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_FORMAT = 1


@dataclass(frozen=True)
class AdapterWeights:
    """The active triplets of one matrix, on the CPU, float32: P (d_out, k), lam (k,), Q (k, d_in)."""

    name: str
    P: torch.Tensor
    lam: torch.Tensor
    Q: torch.Tensor
    scale: float
    weight_is_transposed: bool
    """Whether the base stores its weight as (d_in, d_out), as transformers' Conv1D does."""

    def delta(self) -> torch.Tensor:
        """s P diag(lambda) Q in the layout of the base's weight, float32."""
        delta = (self.P * (self.scale * self.lam)) @ self.Q
        return delta.T if self.weight_is_transposed else delta


def gather_adapters(allocator: RankAllocator) -> list[AdapterWeights]:
    """The adapters of a finished run. Collective: every process calls it and gets all of them."""
    keep = torch.ones(sum(allocator.ranks), dtype=torch.bool) if allocator.keep is None else allocator.keep.cpu()
    adapters = []
    for matrix, whole, kept in zip(
        allocator.matrices, allocator.full_factors(), keep.split(allocator.ranks), strict=True
    ):
        p, lam, qt = (whole[kind] for kind in ("P", "lam", "Qt"))
        if matrix.layer.rank == 0:
            p, qt = torch.empty(matrix.layer.d_out, 0), torch.empty(matrix.layer.d_in, 0)
        adapters.append(
            AdapterWeights(
                matrix.name, p[:, kept].contiguous(), lam[kept], qt[:, kept].T.contiguous(), matrix.layer.scale,
                hasattr(matrix.layer.base, "nf"),
            )
        )  # fmt: skip
    return adapters


def save_adapter(adapters: Sequence[AdapterWeights], folder: Path, base_model: str, base_revision: str | None) -> None:
    """Write adapter.safetensors (NAME.P, NAME.lam, NAME.Q of the active triplets) and adapter.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{a.name}.{kind}": getattr(a, kind) for a in adapters for kind in ("P", "lam", "Q") if a.lam.numel()}
    save_file(tensors, folder / "adapter.safetensors", metadata={"format": "pt"})
    description = {
        "format": _FORMAT,
        "base_model": base_model,
        "base_revision": base_revision,
        "update": "W = W0 + scale * P diag(lam) Q",
        "scales": {a.name: a.scale for a in adapters},
        "rank_pattern": {a.name: a.lam.numel() for a in adapters},
    }
    (folder / "adapter.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: nn.Module, folder: Path) -> list[AdaptedMatrix]:
    """Put a saved adapter into its plain backbone, every matrix at its own rank (0: no branch).

    Raises:
        UserError: the folder is not an adapter of this format, or does not fit the model.
    """
    try:
        description = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter.safetensors")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} does not hold an adapter (adapter.json, adapter.safetensors): {error}") from error
    if description.get("format") != _FORMAT:
        raise UserError(f"{folder}/adapter.json: format {description.get('format')} is not {_FORMAT}")
    matrices = []
    for name, rank in description["rank_pattern"].items():
        parent, _, child = name.rpartition(".")
        try:
            base = model.get_submodule(name)
        except AttributeError as error:
            raise UserError(
                f"{folder}: the adapter's matrix {name} is not in this model: load its base model"
            ) from error
        d_in, d_out = linear_shape(base) or (0, 0)
        layer = SVDLinear(base, d_in, d_out, rank, description["scales"][name])
        if rank:
            p, q = tensors[f"{name}.P"], tensors[f"{name}.Q"]
            if p.shape != (d_out, rank) or q.shape != (rank, d_in):
                raise UserError(
                    f"{folder}: {name} has P {tuple(p.shape)} and Q {tuple(q.shape)}, but the model's matrix is "
                    f"{d_out} x {d_in}: load its base model"
                )
            with torch.no_grad():
                layer.P.copy_(p)
                layer.lam.copy_(tensors[f"{name}.lam"])
                layer.Qt.copy_(q.T)
        setattr(model.get_submodule(parent), child, layer)
        matrices.append(AdaptedMatrix(name, layer))
    return matrices


def merge(
    adapters: Sequence[AdapterWeights],
    base_folder: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    trained: dict[str, torch.Tensor] | None = None,
    show_progress: bool = True,
) -> None:
    """Write the merged model: the base's files with W0 + s P diag(lambda) Q in place of W0.

    Built beside ``folder`` and renamed when complete. Sums are float32; ``dtype`` None keeps each tensor's type.

    Args:
        adapters: of every adapted matrix.
        base_folder: the backbone as transformers saved it, in safetensors.
        folder: must not exist.
        dtype: of all floating-point weights written.
        trained: full tensors that training replaced (``train_modules``), by parameter name.

    Raises:
        UserError: the base has no safetensors, or lacks the weight of an adapted matrix.
    """
    shards = sorted(base_folder.glob("*.safetensors"))
    if not shards:
        raise UserError(
            f"{base_folder} has no .safetensors files to merge into: save the base model with save_pretrained"
        )
    replaced = {f"{a.name}.weight": a for a in adapters if a.lam.numel()}
    whole = dict(trained or {})
    places = _find_tensors([*replaced, *whole], shards, base_folder)
    building = folder.with_name(folder.name + ".partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for shard in tqdm(shards, desc="merge", unit="file", disable=not show_progress):
        tensors = {}
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                tensor = file.get_tensor(key)
                name = places.get(key)
                if name in whole:
                    tensor = whole[name].to(tensor.dtype)
                elif name is not None:
                    tensor = (tensor.float() + replaced[name].delta()).to(dtype or tensor.dtype)
                tensors[key] = (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).contiguous()
            save_file(tensors, building / shard.name, metadata=file.metadata() or {"format": "pt"})
    for path in base_folder.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(path, building / path.name)
    if dtype is not None:
        config = json.loads((building / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        (building / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    building.rename(folder)


def _find_tensors(names: Sequence[str], shards: Sequence[Path], base_folder: Path) -> dict[str, str]:
    """Key in the files -> parameter name. A base saved without its head lacks the leading 'model.' or the like."""
    keys = set()
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            keys |= set(file.keys())
    places = {}
    for name in names:
        for candidate in (name, name.partition(".")[2]):
            if candidate in keys:
                places[candidate] = name
                break
        else:
            raise UserError(f"{base_folder}: no tensor {name} in its .safetensors files: merge into the run's own base")
    return places


def base_folder_of(name: str, revision: str | None) -> Path:
    """The local folder of a backbone: itself, or the Hub snapshot that loading it has cached.

    Raises:
        UserError: the snapshot has no safetensors, or cannot be had.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.model"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"model={name}: its files are not cached and the Hub cannot be reached ({error})") from error
