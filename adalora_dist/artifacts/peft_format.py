"""LoRA and AdaLoRA adapters in PEFT's file formats: ``adapter_config.json`` and ``adapter_model.safetensors``.

Plain LoRA is exact: A = the active rows of Q, B = s P diag(lambda), alpha = rank for every module, so that whoever
loads it multiplies by exactly 1. vLLM reads the same files; up to 0.30 it knows one alpha / r for all modules, which
is 1 here, too.

PEFT's AdaLoRA has P, lambda and Q of their own (lora_B, lora_E, lora_A) and scales by alpha / (init_r + 1e-5).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import read_object
from adalora_dist.methods.adalora.start import PREFIX, RANKNUM_OFFSET
from adalora_dist.methods.update import AdapterWeights

VLLM_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's --max-lora-rank takes."""


class Folded(NamedTuple):
    """What cutting ranks has cost."""

    num_matrices: int
    """Whose rank was above the limit."""
    largest_error: float
    """Frobenius norm of what was lost over that of the update, of the matrix that lost most."""
    total_error: float
    """The same over all matrices together."""


def fold(adapters: Sequence[AdapterWeights], max_rank: int) -> tuple[list[AdapterWeights], Folded]:
    """The nearest adapters (in Frobenius norm) of rank at most ``max_rank``: a truncated SVD of each update.

    Through QR decompositions of the factors, so the largest matrix decomposed is rank x rank.
    """
    folded, errors = [], []
    lost = norm = 0.0
    for adapter in adapters:
        factor_p, factor_q = adapter.P * (adapter.scale * adapter.lam), adapter.Q
        if adapter.rank > max_rank:
            (q_p, r_p), (q_q, r_q) = (torch.linalg.qr(x.double()) for x in (factor_p, factor_q.T))
            u, singular, vt = torch.linalg.svd(r_p @ r_q.T)
            kept, tail = singular[:max_rank], singular[max_rank:]
            errors.append((tail.norm() / singular.norm()).item())
            lost += tail.square().sum().item()
            norm += singular.square().sum().item()
            p, q = q_p @ u[:, :max_rank], (vt @ q_q.T)[:max_rank]
            adapter = replace(adapter, P=p.float(), lam=(kept / adapter.scale).float(), Q=q.float().contiguous())
        else:  # tr(B^T B A A^T), without the product of the two large factors
            norm += torch.sum((factor_p.T @ factor_p) * (factor_q @ factor_q.T)).item()
        folded.append(adapter)
    return folded, Folded(len(errors), max(errors, default=0.0), (lost / norm) ** 0.5 if norm else 0.0)


def save_lora(
    adapters: Sequence[AdapterWeights],
    folder: Path,
    base_model: str,
    base_revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    trained: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write plain LoRA of the same function: active triplets only, matrices of rank 0 left out.

    Args:
        adapters: of every adapted matrix.
        folder: must not exist. Built beside it and renamed when complete.
        base_model: Hub id or folder of the backbone, for PEFT to find.
        dtype: of the factors; all but float32 round them.
        trained: full tensors that training replaced (``train_modules``), by parameter name.

    Raises:
        UserError: there is no active triplet.
    """
    kept = [a for a in adapters if a.rank]
    if not kept:
        raise UserError("the run ended with rank 0 everywhere: there is no LoRA to write, the base model is the result")
    ranks = {_anchored(a.name): a.rank for a in kept}
    largest = max(ranks.values())
    config = {
        **_common_config(adapters, kept, base_model, base_revision, trained),
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "use_rslora": False,
        "use_dora": False,
    }
    tensors = {}
    for adapter in kept:
        name = PREFIX + adapter.name
        tensors[f"{name}.lora_A.weight"] = adapter.Q.to(dtype)
        tensors[f"{name}.lora_B.weight"] = (adapter.P * (adapter.scale * adapter.lam)).to(dtype)
    _write(folder, config, tensors, trained)


def vllm_options(folder: Path) -> str:
    """Options with which vLLM serves an adapter of :func:`save_lora`, or why it does not take it.

    Raises:
        UserError: the folder holds no LoRA.
    """
    config = read_object(folder / "adapter_config.json")
    largest = config.get("r")
    if not isinstance(largest, int):
        raise UserError(f"{folder}/adapter_config.json: r is {largest!r:.50}, must be an integer: export again")
    if config.get("modules_to_save"):
        return "takes no adapter with modules that were trained in full (modules_to_save): serve the merged model"
    accepted = next((rank for rank in VLLM_MAX_RANKS if rank >= largest), None)
    if accepted is None:
        return f"takes ranks up to {VLLM_MAX_RANKS[-1]}, not {largest}: export with --max-rank and --fold, or merged"
    return f"--enable-lora --max-lora-rank {accepted} --lora-modules NAME={folder}"


def save_adalora(
    adapters: Sequence[AdapterWeights],
    folder: Path,
    base_model: str,
    base_revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    trained: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write PEFT's AdaLoRA of the same function, matrices of rank 0 included. Arguments as of :func:`save_lora`.

    The schedule in it is spent: PEFT can train the adapter further with its ranks as they are.
    """
    init_rank = max(1, *(a.rank for a in adapters))
    alpha = adapters[0].scale * init_rank
    config = {
        **_common_config(adapters, adapters, base_model, base_revision, trained),
        "peft_type": "ADALORA",
        "init_r": init_rank,
        "target_r": init_rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"{a.name}.lora_E": [i < a.rank for i in range(init_rank)] for a in adapters},
        "tinit": 0,
        "tfinal": 0,
        "total_step": 1,
    }
    tensors = {}
    for adapter in adapters:
        name = PREFIX + adapter.name
        own_scale = adapter.scale * (init_rank + RANKNUM_OFFSET) / alpha  # 1 + 1e-5 / init_r
        tensors[f"{name}.lora_A"] = adapter.Q.to(dtype)
        tensors[f"{name}.lora_E"] = (adapter.lam * own_scale).unsqueeze(1).to(dtype)
        tensors[f"{name}.lora_B"] = adapter.P.to(dtype)
    _write(folder, config, tensors, trained)


def _common_config(
    adapters: Sequence[AdapterWeights],
    kept: Sequence[AdapterWeights],
    base_model: str,
    base_revision: str | None,
    trained: Mapping[str, torch.Tensor] | None,
) -> dict[str, Any]:
    return {
        "base_model_name_or_path": base_model,
        "revision": base_revision,
        "target_modules": _exactly([a.name for a in kept], [a.name for a in adapters]),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in trained}) if trained else None,
        "fan_in_fan_out": any(a.weight_is_transposed for a in kept),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "task_type": None,
    }


def _anchored(name: str) -> str:
    """A key that PEFT's ``re.match(rf"(.*\\.)?({key})$", module)`` finds in the module of this name alone."""
    return "^" + re.escape(name)


def _exactly(names: Sequence[str], others: Iterable[str]) -> list[str] | str:
    """``target_modules`` that hit ``names`` alone. PEFT takes a listed name as the end of a longer one, too."""
    if any(other.endswith(f".{name}") for name in names for other in others):
        return "|".join(map(re.escape, names))
    return sorted(names)


def _write(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], trained: Mapping[str, torch.Tensor] | None
) -> None:
    tensors |= {PREFIX + name: tensor for name, tensor in (trained or {}).items()}
    building = folder.with_name(folder.name + ".partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, building / "adapter_model.safetensors", {"format": "pt"})
    (building / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    building.rename(folder)
