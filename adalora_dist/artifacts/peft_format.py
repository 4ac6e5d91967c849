"""Adapters in PEFT's formats (``adapter_config.json``, ``adapter_model.safetensors``): LoRA, AdaLoRA, DoRA and VeRA.

Plain LoRA is exact: A = the active rows of Q, B = s P diag(lambda), alpha = rank for every module, so that whoever
loads it multiplies by exactly 1. vLLM reads the same files; up to 0.30 it knows one alpha / r for all modules, which
is 1 here, too.

PEFT's AdaLoRA has P, lambda and Q of their own (lora_B, lora_E, lora_A) and scales by alpha / (init_r + 1e-5). Its DoRA
is LoRA with the lengths of the merged rows beside (lora_magnitude_vector); its VeRA has the vectors of each matrix and
the projections that all share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch.nn.functional import pad as pad_with_zeros

from adalora_dist.artifacts.peft_check import PROMPT, taken_for_experts, verify
from adalora_dist.artifacts.peft_config import anchored, common_config, task_of
from adalora_dist.artifacts.peft_experts import expert_lora
from adalora_dist.artifacts.whole import apart, check_whole
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import read_object
from adalora_dist.io.publish import building
from adalora_dist.io.redaction import redacted
from adalora_dist.methods.adalora.start import PREFIX, RANKNUM_OFFSET
from adalora_dist.methods.dora import DoraUpdate
from adalora_dist.methods.prefix import PrefixUpdate
from adalora_dist.methods.update import AdapterWeights, Update
from adalora_dist.methods.vera import VeraUpdate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    base_model: str | None,
    base_revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    trained: Mapping[str, torch.Tensor] | None = None,
    model: PreTrainedModel | None = None,
    pad: bool = False,
) -> None:
    """Write plain LoRA of the same function: active triplets only, matrices of rank 0 left out.

    Args:
        adapters: of every adapted matrix.
        folder: must not exist. Built beside it and renamed when complete.
        base_model: Hub id or folder of the backbone, for PEFT to find; None: whoever loads it has to know.
        dtype: of the factors; all but float32 round them.
        trained: full tensors that training replaced (``train_modules``), by parameter name.
        model: from :func:`adalora_dist.backbones.names.plain_model`. Gives PEFT the task, finds what it would take for
            experts, and is what the adapter is loaded into to verify it. Without one, names are all there is.
        pad: bring all matrices to the largest rank with zeros, so that one rank and one alpha hold for all.

    Raises:
        UserError: there is no active triplet; as of :func:`adalora_dist.artifacts.peft_check.verify` and of
            :func:`adalora_dist.io.publish.building`.
    """
    largest = max((a.rank for a in adapters), default=0)
    experts = expert_lora(adapters, model, largest if pad else 0)
    adapters = experts.others
    kept = [a for a in adapters if a.rank]
    if not kept and not experts.ranks:
        raise UserError("the run ended with rank 0 everywhere: there is no LoRA to write, the base model is the result")
    # Parameters, where PEFT would take the module for one of the experts that transformers has stacked.
    taken = taken_for_experts([a.name for a in kept], model)
    ranks = {anchored(a.name) + (r"(|\.weight)" if a.name in taken else ""): a.rank for a in kept}
    ranks |= {anchored(name): rank for name, rank in experts.ranks.items()}
    config = {
        **common_config(adapters, [a for a in kept if a.name not in taken], base_model, base_revision, trained, model),
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": {} if pad else ranks,
        "alpha_pattern": {} if pad else ranks,
        "use_rslora": False,
        "use_dora": False,
    }
    if parameters := [*(f"{name}.weight" for name in taken), *experts.ranks]:
        config["target_parameters"] = parameters
    tensors = {key: tensor.to(dtype) for key, tensor in experts.tensors.items()}
    for adapter in kept:
        name = PREFIX + adapter.name
        factor_a, factor_b = adapter.Q, adapter.P * (adapter.scale * adapter.lam)
        if pad:
            zeros = largest - adapter.rank
            factor_a, factor_b = pad_with_zeros(factor_a, (0, 0, 0, zeros)), pad_with_zeros(factor_b, (0, zeros))
        tensors[f"{name}.lora_A.weight"] = factor_a.to(dtype)
        tensors[f"{name}.lora_B.weight"] = factor_b.to(dtype)
    _write(folder, config, tensors, trained, model, experts.parameters)


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
    if any(not name.endswith(".weight") for name in config.get("target_parameters") or ()):
        return (
            "takes adapters of experts (target_parameters) for some models alone, and none where experts are spread "
            "over GPUs: where it refuses this one, serve the merged model"
        )
    accepted = next((rank for rank in VLLM_MAX_RANKS if rank >= largest), None)
    if accepted is None:
        return f"takes ranks up to {VLLM_MAX_RANKS[-1]}, not {largest}: export with --max-rank and --fold, or merged"
    return f"--enable-lora --max-lora-rank {accepted} --lora-modules NAME={folder}"


def save_adalora(
    adapters: Sequence[AdapterWeights],
    folder: Path,
    base_model: str | None,
    base_revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    trained: Mapping[str, torch.Tensor] | None = None,
    model: PreTrainedModel | None = None,
) -> None:
    """Write PEFT's AdaLoRA of the same function, matrices of rank 0 included. Arguments as of :func:`save_lora`.

    The schedule in it is spent: PEFT can train the adapter further with its ranks as they are.

    Raises:
        UserError: experts of a stack are adapted, which PEFT's AdaLoRA cannot be; as :func:`save_lora`.
    """
    if experts := expert_lora(adapters, model).ranks:
        raise UserError(f"{folder}: PEFT has no AdaLoRA of experts ({min(experts)}): use lora, or the merged model")
    init_rank = max(1, *(a.rank for a in adapters))
    alpha = adapters[0].scale * init_rank
    config = {
        **common_config(adapters, adapters, base_model, base_revision, trained, model),
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
    _write(folder, config, tensors, trained, model)


def save_dora(
    adapters: Sequence[DoraUpdate],
    folder: Path,
    base_model: str,
    base_revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    trained: Mapping[str, torch.Tensor] | None = None,
    model: PreTrainedModel | None = None,
    *,
    lengths: Mapping[str, torch.Tensor],
) -> None:
    """Write PEFT's DoRA of the same function: B carries the scale, alpha is the rank. Arguments as of save_lora.

    A matrix of rank 0 keeps its lengths, beside factors of rank 1 that are 0.

    Args:
        lengths: of every row of each base weight, (d_out,), by the name of the matrix.

    Raises:
        UserError: PEFT would divide 0 by 0, or takes a matrix for one of stacked experts; as :func:`save_lora`.
    """
    _refuse_experts(adapters, folder, model, "DoRA")
    largest = max(1, *(a.rank for a in adapters))  # PEFT has no rank 0
    ranks = {anchored(a.name): max(1, a.rank) for a in adapters}
    ranks = ranks if min(ranks.values()) < largest else {}
    config = {
        **common_config(adapters, adapters, base_model, base_revision, trained, model),
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "use_rslora": False,
        "use_dora": True,
    }
    tensors = {}
    for adapter in adapters:
        name, b, a = PREFIX + adapter.name, adapter.P * adapter.matrix.scale, adapter.Q
        if not adapter.rank:
            b, a = pad_with_zeros(b, (0, 1)), pad_with_zeros(a, (0, 0, 0, 1))
        own, added = lengths[adapter.name], torch.linalg.vector_norm(b @ a, dim=1)
        if ((own == 0) & (added == 0)).any():
            raise UserError(
                f"{folder}: {adapter.name} has rows that are 0 with and without the adapter, of which PEFT makes nan: "
                "use the merged model"
            )
        tensors[f"{name}.lora_A.weight"] = a.to(dtype)
        tensors[f"{name}.lora_B.weight"] = b.to(dtype)
        # Rows of 0 get what is added to them as it is.
        tensors[f"{name}.lora_magnitude_vector"] = torch.where(own == 0, added, own + adapter.dm).to(dtype)
    _write(folder, config, tensors, trained, model)


def save_vera(
    adapters: Sequence[VeraUpdate],
    folder: Path,
    base_model: str,
    base_revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    trained: Mapping[str, torch.Tensor] | None = None,
    model: PreTrainedModel | None = None,
) -> None:
    """Write PEFT's VeRA of the same function, the projections included. Arguments as of :func:`save_lora`.

    Raises:
        UserError: PEFT takes a matrix for one of stacked experts; as :func:`save_lora`.
    """
    _refuse_experts(adapters, folder, model, "VeRA")
    config = {
        **common_config(adapters, adapters, base_model, base_revision, trained, model),
        "peft_type": "VERA",
        "r": adapters[0].rank,
        "projection_prng_key": adapters[0].seed,
        "save_projection": True,
        "vera_dropout": 0.0,
    }
    del config["lora_dropout"]
    a, b = adapters[0].shared.matrices
    tensors = {"base_model.vera_A": a.to(dtype), "base_model.vera_B": b.to(dtype)}
    for adapter in adapters:
        tensors[f"{PREFIX}{adapter.name}.vera_lambda_b"] = adapter.b.to(dtype)
        tensors[f"{PREFIX}{adapter.name}.vera_lambda_d"] = adapter.d.to(dtype)
    _write(folder, config, tensors, trained, model)


def save_prefix(
    adapters: Sequence[PrefixUpdate],
    folder: Path,
    base_model: str,
    base_revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    trained: Mapping[str, torch.Tensor] | None = None,
    model: PreTrainedModel | None = None,
) -> None:
    """Write PEFT's prefix of the same function. Arguments as of :func:`save_lora`.

    Raises:
        UserError: something else was trained, too, which this form cannot hold; as :func:`save_lora`.
    """
    if trained:
        raise UserError(
            f"{folder}: PEFT's form of a prefix cannot hold {next(iter(trained))}, which was trained in full: load the "
            "run's adapter folder with load_adapter(model, folder), and its trained.safetensors"
        )
    [adapter] = adapters
    heads = adapter.heads
    config = {
        "base_model_name_or_path": redacted(base_model),
        "revision": base_revision,
        "inference_mode": True,
        **({"task_type": "CAUSAL_LM"} if model is None else task_of(model)),
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": adapter.rank,
        "token_dim": heads.num_heads * heads.head_size,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads.num_heads,
        "num_layers": heads.num_layers,
        "encoder_hidden_size": adapter.matrix.shape[1],
        "prefix_projection": False,
    }
    _write(folder, config, {PROMPT: adapter.embedding.to(dtype)}, None, model)


def _refuse_experts(adapters: Sequence[Update], folder: Path, model: PreTrainedModel | None, kind: str) -> None:
    if taken := taken_for_experts([a.name for a in adapters], model):
        raise UserError(f"{folder}: PEFT takes {taken[0]} for a stack of experts, without {kind}: use the merged model")


def _write(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    trained: Mapping[str, torch.Tensor] | None,
    model: PreTrainedModel | None,
    parameters: Mapping[str, str] | None = None,
) -> None:
    tensors |= {PREFIX + name: tensor for name, tensor in (trained or {}).items()}
    tensors = apart(tensors)
    with building(folder) as scratch:
        save_file(tensors, scratch / "adapter_model.safetensors", {"format": "pt"})
        (scratch / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        check_whole(scratch, {"adapter_model.safetensors": tensors})
        if model is not None:
            verify(scratch, model, tensors, sorted(trained or ()), target=folder, parameters=parameters or {})
