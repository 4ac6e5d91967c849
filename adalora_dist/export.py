"""What a run leaves behind: the adapter alone, and a merged model that plain transformers loads.

W = W0 + s P diag(lambda) Q. Merging goes through the backbone's own safetensors files, one file at a time, so it
needs no model in memory, works the same after every engine, and leaves everything that was not adapted bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from adalora_dist.allocator import RankAllocator
from adalora_dist.errors import UserError
from adalora_dist.inject import AdaptedMatrix, linear_shape
from adalora_dist.layers import SVDLinear
from adalora_dist.progress import progress_bar

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

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the base's weight."""
        d_out, d_in = len(self.P), self.Q.shape[1]
        return (d_in, d_out) if self.weight_is_transposed else (d_out, d_in)

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
        kept = kept[list(matrix.layer.triplets)]
        p, lam, qt = (whole[kind] for kind in ("P", "lam", "Qt"))
        adapters.append(
            AdapterWeights(
                matrix.name, p[:, kept].contiguous(), lam[kept], qt[:, kept].T.contiguous(), matrix.layer.scale,
                _is_conv1d(matrix.layer.base),
            )
        )  # fmt: skip
    return adapters


def _is_conv1d(base: nn.Module) -> bool:
    """Whether the files have the weight as (d_in, d_out). A quantised linear remembers what it has replaced."""
    return hasattr(base, "nf") or getattr(base, "source_cls", type(base)).__name__ == "Conv1D"


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
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} does not hold an adapter (adapter.json, adapter.safetensors): {error}") from error
    if description.get("format") != _FORMAT:
        raise UserError(f"{folder}/adapter.json: format {description.get('format')} is not {_FORMAT}")
    ranks = description["rank_pattern"]
    for key in (f"{name}.{kind}" for name, rank in ranks.items() if rank for kind in ("P", "lam", "Q")):
        if key not in tensors:
            raise UserError(f"{folder}/adapter.safetensors has no tensor {key}, which adapter.json promises: copy both")
    modules = dict(model.named_modules())
    matrices = []
    for name, rank in ranks.items():
        parent, _, child = name.rpartition(".")
        base = modules.get(name)
        shape = linear_shape(base) if base is not None else None
        if base is None or shape is None:
            raise UserError(f"{folder}: the adapter's matrix {name} is not in this model: load its plain base model")
        d_in, d_out = shape
        layer = SVDLinear(base, d_in, d_out, rank, description["scales"][name], name=name)
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


class BaseWeight(Protocol):
    """What the merged model has of the backbone in place of a tensor of its files."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in the files."""
        ...

    def __call__(self, stored: torch.Tensor) -> torch.Tensor:
        """The weight, float32 on the CPU, in the layout of the files."""
        ...


def merge(
    adapters: Sequence[AdapterWeights],
    base_folder: Path,
    folder: Path,
    dtype: torch.dtype | None = None,
    trained: dict[str, torch.Tensor] | None = None,
    base_weights: Mapping[str, BaseWeight] | None = None,
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
        base_weights: by parameter name, what takes the place of a tensor of the files before its update is added,
            for instance its quantised value. Default: W0 as the files have it.

    Raises:
        UserError: the base has no safetensors, or lacks the weight of an adapted matrix in its shape.
    """
    shards = _weight_files(base_folder)
    if not shards:
        raise UserError(
            f"{base_folder} has no .safetensors files to merge into: save the base model with save_pretrained"
        )
    replaced = {f"{a.name}.weight": a for a in adapters if a.lam.numel()}
    whole = dict(trained or {})
    bases = dict(base_weights or {})
    shapes = {name: base.shape for name, base in bases.items()}
    shapes |= {name: a.weight_shape for name, a in replaced.items()} | {n: tuple(t.shape) for n, t in whole.items()}
    places = _find_tensors(shapes, shards, base_folder)
    building = folder.with_name(folder.name + ".partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for shard in progress_bar(shards, desc="merge", unit="file", show=show_progress):
        tensors = {}
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                tensor = file.get_tensor(key)
                name = places.get(key)
                if name in whole:
                    tensor = whole[name].to(tensor.dtype)
                elif name is not None:
                    weight = bases[name](tensor) if name in bases else tensor.float()
                    if name in replaced:
                        weight = weight + replaced[name].delta()
                    tensor = weight.to(dtype or tensor.dtype)
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


def _weight_files(base_folder: Path) -> list[Path]:
    """The safetensors files that transformers loads: those of its index, else model.safetensors, else none.

    A folder may hold others, such as the consolidated.safetensors that some publishers put beside them.
    """
    index = base_folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(base_folder / name for name in names)
    single = base_folder / "model.safetensors"
    return [single] if single.is_file() else []


def _find_tensors(shapes: Mapping[str, tuple[int, ...]], shards: Sequence[Path], base_folder: Path) -> dict[str, str]:
    """Key in the files -> parameter name. A base saved without its head lacks the leading 'model.' or the like."""
    found: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    places = {}
    for name, shape in shapes.items():
        key = next((key for key in (name, name.partition(".")[2]) if key in found), None)
        if key is None:
            raise UserError(f"{base_folder}: no tensor {name} in its .safetensors files: merge into the run's own base")
        if found[key] != shape:
            raise UserError(
                f"{base_folder}: tensor {key} has shape {found[key]}, the run's has {shape}: merge into the run's own "
                "base, not quantised"
            )
        places[key] = name
    return places


def base_folder_of(name: str, revision: str | None) -> Path:
    """The local folder of a backbone: itself, or the Hub snapshot that loading it has cached.

    Raises:
        UserError: the snapshot cannot be had.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.model"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"model={name}: its files are not cached and the Hub cannot be reached ({error})") from error
