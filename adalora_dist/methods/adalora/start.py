"""Adapters of PEFT, LoRA or AdaLoRA, as triplets to start from: scale_theirs B A = s P diag(lambda) Q, exactly.

LoRA goes through an SVD of its update: P and Q have orthonormal columns and rows, as the regulariser wants them, and
lambda holds the singular values, so that importance sees the update's own directions. Columns merely scaled to unit
length would be as exact, but far from orthogonal, and the first steps would be spent on turning them. AdaLoRA's
triplets have been through that regulariser already: they stay as they are, and only lambda is scaled. LoRA of stacked
experts is one update for each of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from adalora_dist.backbones.experts import ExpertStack
from adalora_dist.backbones.files import is_module_pattern
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import check_tensors, read_object
from adalora_dist.methods.adalora.layers import TripletLayer
from adalora_dist.methods.adalora.peft_stacks import targeted, unpacked, wrapper_paths

PREFIX = "base_model.model."
"""What PEFT puts before the names of the plain model."""
RANKNUM_OFFSET = 1e-5
"""PEFT's AdaLoRA divides alpha by init_r plus this."""
_VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "lora_bias": "LoRA with a bias in B",
    "layer_replication": "LoRA on repeated layers",
}
"""By the field of adapter_config.json that turns it on."""
_INITS_OF_ADAPTERS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base alone; PiSSA, OLoRA, CorDA, LoftQ and the like take their start out of it."""
_FACTORS = {"LORA": ("lora_A.weight", "lora_B.weight"), "ADALORA": ("lora_A", "lora_B", "lora_E")}


class Triplets(NamedTuple):
    """Of one matrix, float32: P (d_out, k), lam (k,), Q (k, d_in)."""

    P: torch.Tensor
    lam: torch.Tensor
    Q: torch.Tensor


def read_peft(folder: Path, scale: float, stacks: Mapping[ExpertStack, bool] | None = None) -> dict[str, Triplets]:
    """An adapter folder of PEFT, by the names that its matrices have in the plain model.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors; pickled weights are not read.
        scale: s, by which the branch is multiplied here.
        stacks: all stacks of experts of the plain model, and whether PEFT swaps their factors (``is_swapped``).

    Raises:
        UserError: the folder is no such adapter, its variant has no such form (DoRA, PiSSA, biases), or a tensor in
            it belongs to no matrix.
    """
    try:
        config = read_object(folder / "adapter_config.json")
        check_tensors(folder / "adapter_model.safetensors")
        tensors = load_file(folder / "adapter_model.safetensors")
        kind = str(config["peft_type"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(
            f"init_from={folder} is no adapter folder of PEFT (adapter_config.json, adapter_model.safetensors): {error}"
        ) from error
    refuse_other_functions(config, kind, f"init_from={folder}")
    _check_numbers(config, kind, folder)
    stacks = stacks or {}
    of_experts = wrapper_paths(targeted(stacks, config)) if kind == "LORA" else {}
    triplets: dict[str, Triplets] = {}
    for key in [key for key in tensors if key.endswith(f".{_FACTORS[kind][0]}")]:
        stem = key.removesuffix(_FACTORS[kind][0])
        name = stem.removeprefix(PREFIX).removesuffix(".")
        factors = [tensors.pop(stem + factor, None) for factor in _FACTORS[kind]]
        if not stem.startswith(PREFIX) or any(f is None or f.ndim != 2 for f in factors):
            raise UserError(f"init_from={folder}: {key} lacks its prefix or its other factor: export the adapter again")
        a, b, *e = (f.float() for f in factors if f is not None)
        if (stack := of_experts.get(name)) is not None:
            rank, rest = divmod(len(a), stack.num_experts)
            if rest or len(a) != b.shape[1]:
                raise UserError(
                    f"init_from={folder}: the factors of {stack.name} are no {stack.num_experts} experts' of one rank: "
                    "use the adapter's own base model"
                )
            a, b = unpacked(a, b, stack.num_experts, stacks[stack])
            updates = decompose(b.mT, a, _lora_scale(config, stack.name, rank, folder) / scale)
            triplets |= zip(stack.matrix_names(), map(Triplets, *updates), strict=True)
            continue
        if not (len(a) == b.shape[1] == (len(e[0]) if e else len(a))):
            raise UserError(f"init_from={folder}: the factors of {name} have different ranks: export the adapter again")
        if kind == "ADALORA":
            theirs = config["lora_alpha"] / (config["init_r"] + RANKNUM_OFFSET)
            triplets[name] = Triplets(b, e[0].flatten() * (theirs / scale), a)
        else:
            triplets[name] = decompose(b, a, _lora_scale(config, name, len(a), folder) / scale)
    if tensors or not triplets:
        shown = ", ".join(sorted(tensors)[:3]) or "none"
        raise UserError(
            f"init_from={folder}: {len(tensors)} tensors ({shown}) are not factors of an adapted linear map, "
            f"{len(triplets)} matrices are: only adapters can be started from"
        )
    return triplets


def refuse_other_functions(config: Mapping[str, Any], kind: str, where: str) -> None:
    """Raise unless the adapter adds scale B A to the base as it is, and nothing else.

    Args:
        config: what adapter_config.json says.
        where: the adapter, for messages.
    """
    if kind not in _FACTORS:
        raise UserError(f"{where} is of the type {kind!r:.50}: must be LORA or ADALORA")
    if (bias := config.get("bias", "none")) != "none":
        raise UserError(f"{where} has bias={bias!r:.50}, trained biases: must be none")
    variant = next((f"{name} ({field})" for field, name in _VARIANTS.items() if config.get(field)), None)
    if variant is not None:
        raise UserError(f"{where} is {variant}, which no triplets equal: must be plain LORA or ADALORA")
    init = config.get("init_lora_weights", True)
    if init not in _INITS_OF_ADAPTERS:
        raise UserError(
            f"{where} has init_lora_weights={init!r:.50}, whose adapters go with a changed base: have PEFT "
            "convert it to plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _check_numbers(config: Mapping[str, Any], kind: str, folder: Path) -> None:
    """The configuration may be anybody's: positive numbers, and patterns that are safe to match."""
    values = {name: config.get(name) for name in ("lora_alpha", "init_r" if kind == "ADALORA" else "r")}
    for field in ("rank_pattern", "alpha_pattern") if kind == "LORA" else ():
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict) or not all(map(is_module_pattern, pattern)):
            raise UserError(f"init_from={folder}: {field} in adapter_config.json must map names of modules to numbers")
        values |= {f"{field} of {key}": value for key, value in pattern.items()}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"init_from={folder}: {name} in adapter_config.json is {value!r:.50}, must be a number > 0")


def decompose(b: torch.Tensor, a: torch.Tensor, factor: float) -> Triplets:
    """SVD of factor * B A through QR of both, so the largest matrix decomposed is k x k; in float64.

    Of a batch, (experts, d_out, k) and (experts, k, d_in), that of each.
    """
    (q_b, r_b), (q_a, r_a) = (torch.linalg.qr(x.double()) for x in (b, a.mT))
    u, singular, vt = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return Triplets((q_b @ u).float(), (factor * singular).float(), (vt @ q_a.mT).float())


def _lora_scale(config: Mapping[str, Any], name: str, rank: int, folder: Path) -> float:
    """alpha / r, or alpha / sqrt(r) with rslora, by PEFT's own rule for its patterns."""

    def of(pattern: str, default: str) -> float:
        keys = config.get(pattern) or {}
        chosen = (value for key, value in keys.items() if re.match(rf"(.*\.)?({key})$", name))
        value: float = next(chosen, config[default])
        return value

    r, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
    if r != rank:
        raise UserError(f"init_from={folder}: adapter_config.json gives {name} rank {r}, its tensors {rank}")
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def with_lambda_in_p(triplets: Triplets) -> Triplets:
    """The same update with lambda = 1."""
    return Triplets(triplets.P * triplets.lam, torch.ones_like(triplets.lam), triplets.Q)


@torch.no_grad()
def start_with(layer: TripletLayer, given: Mapping[str, Triplets], where: str) -> None:
    """Put given triplets of each matrix before its fresh ones, which add nothing at the start.

    Args:
        given: by the name of the matrix.
        where: they are from, for messages.

    Raises:
        UserError: they are more than the matrix has, or of another shape.
    """
    firsts = [0, *accumulate(layer.ranks)]
    for name, rank, first in zip(layer.matrix_names(), layer.ranks, firsts, strict=False):
        if name not in given:
            continue
        p, lam, q = given[name]
        if len(lam) > rank:
            raise UserError(
                f"{where} has rank {len(lam)} at {name}, with init_rank {rank}: set init_rank to at least {len(lam)}"
            )
        if (len(p), q.shape[1]) != (layer.d_out, layer.d_in):
            raise UserError(
                f"{where}: {name} is {len(p)} x {q.shape[1]} there and {layer.d_out} x {layer.d_in} in this model: "
                "use the adapter's own base model"
            )
        own = slice(first, first + len(lam))
        layer.P[:, own] = p.to(layer.P.device)
        layer.lam[own] = lam.to(layer.lam.device)
        layer.Qt[:, own] = q.T.to(layer.Qt.device)
