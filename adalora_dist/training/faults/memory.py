"""What this process holds of a prepared model, in bytes, counted from the tensors themselves; what would take less."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate import Accelerator
from torch import nn

from adalora_dist.backbones.linears import linear_shape
from adalora_dist.config.engines import BACKBONE_SHARDING
from adalora_dist.config.sections import RunConfig
from adalora_dist.sharding.tensors import held_parts
from adalora_dist.training.engine import engine_name

if TYPE_CHECKING:
    from adalora_dist.training.prepared import Prepared

_ROWS_OR_TOKENS = ("micro_batch_size x tokens", "micro_batch_tokens")


def held_bytes(prepared: Prepared) -> dict[str, int]:
    """Bytes on this process by purpose, between two steps. No collective.

    ``linear_bytes``: frozen linear maps, with the scales of quantised ones; ``other_bytes``: embeddings, norms, head;
    ``adapter_bytes``; ``optimizer_bytes``: moments and, where the engine has them, master weights;
    ``importance_bytes``. Whole storages are counted, so a small view that keeps a large tensor alive shows.
    """
    model: Any = prepared.model
    head = getattr(model, "module", model).get_output_embeddings()
    frozen_linear: list[torch.Tensor] = []
    other: list[torch.Tensor] = []
    adapters: list[torch.Tensor] = []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            linear = linear_shape(module) is not None and module is not head
            kind = adapters if parameter.requires_grad else frozen_linear if linear else other
            kind += held_parts(parameter)
        frozen_linear += _quantization_state(module)
    optimizer = prepared.inner_optimizer
    moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "linear_bytes": _storage_bytes(frozen_linear),
        "other_bytes": _storage_bytes(other),
        "adapter_bytes": _storage_bytes(adapters),
        "optimizer_bytes": _storage_bytes([t for p in [*moments, *masters] for t in held_parts(p)], without=adapters),
        "importance_bytes": _storage_bytes(prepared.hooks.method_step.buffers()),
    }


def memory_advice(accelerator: Accelerator, config: RunConfig, prepared: Prepared | None, step: int) -> str:
    """For a process that ran out of memory: what holds how much of it, and the three cheapest changes. No collective.

    ``prepared`` is None before the engine was set up; ``step`` counts finished steps.
    """
    device = accelerator.device
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    held = {} if prepared is None else held_bytes(prepared)
    weights = held.get("linear_bytes", 0) + held.get("other_bytes", 0)
    if prepared is None:
        where, parts = "while the model was loaded", f"of {_size(total)} this process held {_size(used)}"
    else:
        where = f"in step {step + 1}"
        parts = (
            f"of {_size(total)} this process held {_size(used)}: backbone {_size(weights)}, adapters "
            f"{_size(held['adapter_bytes'])}, optimizer {_size(held['optimizer_bytes'])}, importance "
            f"{_size(held['importance_bytes'])}, the rest, {_size(max(0, used - sum(held.values())))}, mostly "
            f"activations, which grow with {_ROWS_OR_TOKENS[config.train.micro_batch_tokens > 0]}"
        )
    weigh_most = prepared is None or weights > used / 2
    changes = cheapest_changes(config, engine_name(accelerator), accelerator.num_processes, weigh_most)
    listed = "; ".join(f"({n}) {change}" for n, change in enumerate(changes, start=1))
    return f"{where}; {parts}. Cheapest changes: {listed}"


def cheapest_changes(config: RunConfig, engine: str, num_processes: int, weights_weigh_most: bool) -> list[str]:
    """At most three settings that save memory, those that cost least first; first those for what weighs most."""
    train = config.train
    max_length = getattr(getattr(config, "data", None), "max_length", None)
    rows = min(train.micro_batch_size, -(-train.batch_size // num_processes))
    activations = []
    if tokens := train.micro_batch_tokens:
        if (fewer := max(tokens // 2, max_length or 1)) < tokens:
            activations.append(f"micro_batch_tokens {tokens} -> {fewer}: the same result in more passes")
    elif rows > 1:
        fewer = next(size for size in range(rows // 2, 0, -1) if train.batch_size % size == 0)
        activations.append(f"micro_batch_size {train.micro_batch_size} -> {fewer}: the same result in more passes")
    if not train.gradient_checkpointing:
        activations.append("gradient_checkpointing true: the same result for one more forward per step")
    elif train.checkpoint_activations != "full":
        activations.append(f"checkpoint_activations {train.checkpoint_activations} -> full: recompute every block")
    if train.precision == "fp32":
        activations.append("precision bf16: activations of half the size")
    if max_length:
        activations.append(f"max_length {max_length} -> {max_length // 2}: if few rows are longer")
    weights = []
    if config.model.dtype in ("auto", "float32") and config.quantization.quantization == "none":
        weights.append("dtype bfloat16, if the files hold float32: a frozen backbone of half the size")
    if engine not in BACKBONE_SHARDING:
        weights.append("launch/accelerate/fsdp2.yaml or zero3.yaml: each process holds its share of the backbone")
    if config.quantization.quantization == "none":
        weights.append("quantization nf4: the frozen linear maps in 4.13 bits per weight")
    weights.append("more processes under FSDP2 or ZeRO-3, or ds_configs/zero3_offload.json")
    ordered = weights[:2] + activations if weights_weigh_most else activations + weights
    return (ordered + weights[2:])[:3]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _quantization_state(module: nn.Module) -> Iterator[torch.Tensor]:
    """Scales, and with int8 the weights, that bitsandbytes keeps outside of parameters."""
    states = [getattr(module, name, None) for name in ("quant_state", "state", "weight")]
    for part in (*states, *(getattr(state, "state2", None) for state in states)):
        values = (getattr(part, name, None) for name in ("absmax", "code", "offset", "CB", "SCB"))
        yield from (value for value in values if isinstance(value, torch.Tensor))


def _storage_bytes(tensors: Iterable[torch.Tensor], without: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the distinct storages behind ``tensors`` that do not lie behind ``without``."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    for tensor in without:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())
