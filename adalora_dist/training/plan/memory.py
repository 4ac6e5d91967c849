"""What one process of a cluster holds: what it would hold alone (``fake.py``), shared out as the engine does.

Per process, N processes; W weights of the backbone, A what is trained (float32), both in bytes:

    single, ddp   W and A whole; moments 2 A, importance; ddp: buckets of A besides
    fsdp2         rows of each tensor, ceil(rows / N); gathered, the group in use and its neighbour
    zero1, zero2  W and A whole; a float32 copy and moments of A / N, importance of A / N; reduction buckets
    zero3         flat slices of W and A, ceil(elements / N); a float32 copy besides; gathered, up to a thousand million
                  elements (``stage3_max_live_parameters``); reduction bucket

Importance is what AdaLoRA keeps (``bound.state_bytes``): both averages, 2 A, as long as triplets are scored, and the
portions that it works in; these alone after the pattern is frozen and compacted, when A has shrunk to the share of the
budget that is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from adalora_dist.methods.adalora.bound import state_bytes
from adalora_dist.training.plan.cluster import USABLE, Cluster
from adalora_dist.training.plan.fake import StepBytes

FLOAT32 = 4
BITS = {"nf4": 4, "fp4": 4, "int8": 8, "fp8": 8}
_DOUBLE_QUANT, _SCALES = 0.127, 0.5
"""Bits per 4-bit weight for its block's scale, itself quantised or not; 8-bit ones have one a row, which is nothing."""
ZERO_LIVE = 1_000_000_000
"""DeepSpeed's default for elements that stay gathered."""
ZERO_REUSED = 1_000_000_000
"""DeepSpeed's default: a weight stays gathered if fewer elements than these are used before it is used again."""
ZERO_BUCKET = 500_000_000
"""DeepSpeed's default for elements of a reduction bucket; stage 2 with overlap_comm has two."""
ROOT = -1
"""FSDP2's group of what has none of its own."""


@dataclass(frozen=True)
class Tensor:
    """A parameter of the adapted model, as far as plans go."""

    rows: int
    numel: int
    group: int
    """What FSDP2 gathers together, in the order of a forward: embeddings, blocks, head; ``ROOT``: what is left."""
    is_trained: bool
    is_quantized: bool

    def share(self, engine: str, world_size: int) -> int:
        """Elements that a process keeps."""
        if engine == "fsdp2":
            return -(-self.rows // world_size) * (self.numel // self.rows)
        return -(-self.numel // world_size) if engine == "zero3" else self.numel


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    weights: int
    """Of the frozen backbone, as this process keeps them."""
    quantized: int
    """The part of ``weights`` that is in 4 or 8 bits."""
    adapters: int
    """All that is trained, with the copies that the engine keeps."""
    optimizer: int
    importance: int
    gradients: int
    """At the end of backward, with the engine's buckets."""
    gathered: int
    """Weights of others that are here while they are used."""
    activations: int
    """With gradients as they come."""

    @property
    def kept(self) -> int:
        """Between two steps."""
        return self.weights + self.adapters + self.optimizer + self.importance

    @property
    def peak(self) -> int:
        """Within a step: gradients come as activations go, so that the larger of both counts."""
        return self.kept + self.gathered + max(self.activations, self.gradients)

    def fits(self, gigabytes: float) -> bool:
        return self.peak <= USABLE * gigabytes * 1e9


def memory_of(
    tensors: Sequence[Tensor],
    alone: StepBytes,
    cluster: Cluster,
    element_bytes: int,
    compute_bytes: int,
    adapts_ranks: bool,
    quantization: str = "none",
    double_quant: bool = True,
    micro_steps: int = 1,
) -> Memory:
    """
    Args:
        tensors: all parameters of the adapted model.
        alone: the same model's step in one process that shards nothing, not quantised.
        element_bytes: of a frozen weight as it is stored.
        compute_bytes: of the type that forward and backward compute in.
        adapts_ranks: whether there are averages of importance.
        micro_steps: forward and backward passes per optimizer step.
    """
    engine, world = cluster.engine, cluster.num_shards
    if quantization == "none":
        tensors = [replace(t, is_quantized=False) for t in tensors]
    shares = [(t, t.share(engine, world)) for t in tensors]
    packed_bits = BITS.get(quantization, 0) + (
        (_DOUBLE_QUANT if double_quant else _SCALES) if BITS.get(quantization) == 4 else 0
    )
    quantized = round(sum(n for t, n in shares if t.is_quantized) * packed_bits / 8)
    weights = quantized + element_bytes * sum(n for t, n in shares if not t.is_trained and not t.is_quantized)
    trained = FLOAT32 * sum(n for t, n in shares if t.is_trained)
    stepped = -(-FLOAT32 * sum(t.numel for t in tensors if t.is_trained) // world) if "zero" in engine else trained
    adapters, gradients = trained, trained
    if engine in ("zero1", "zero2", "zero3"):
        is_half = compute_bytes < FLOAT32
        adapters = (trained // 2 if is_half else trained) + stepped
        gradients = stepped + compute_bytes * (ZERO_BUCKET * (2 if engine == "zero2" else 1))
        gradients += trained if engine == "zero1" else 0
    elif engine == "ddp" and world > 1:
        adapters += trained  # reduction buckets, kept
    of_method = state_bytes(stepped // FLOAT32)
    importance = of_method["importance"] + of_method["portions"] if adapts_ranks else 0
    activations = alone.activations + (gradients if micro_steps > 1 else 0)
    # A quantised weight is dequantised for its product.
    activations += compute_bytes * max((t.numel for t in tensors if t.is_quantized), default=0)
    gathered = _gathered(tensors, engine, compute_bytes, packed_bits / 8)
    return Memory(
        weights, quantized, adapters, 2 * stepped, importance, gradients, gathered, activations
    )  # fmt: skip


def _gathered(tensors: Sequence[Tensor], engine: str, compute_bytes: int, packed_bytes: float) -> int:
    def size(t: Tensor) -> float:
        return t.numel * (packed_bytes if t.is_quantized else compute_bytes)

    if engine == "zero3":
        numel = sum(t.numel for t in tensors)
        return round(sum(map(size, tensors)) * min(1.0, ZERO_LIVE / numel))
    if engine != "fsdp2":
        return 0
    groups: dict[int, float] = {}
    for t in tensors:
        groups[t.group] = groups.get(t.group, 0.0) + size(t)
    in_order = [groups[group] for group in sorted(groups)]
    return round(max(a + b for a, b in zip(in_order, [*in_order[1:], 0.0], strict=True)))


def after_freeze(before: Memory, share: float, is_compacted: bool) -> Memory:
    """The same once the pattern is frozen, with ``share`` of the triplets left, spread evenly.

    Args:
        is_compacted: whether pruned triplets are removed from memory.
    """
    if not is_compacted:
        return before
    optimizer = round(before.optimizer * share)
    portions = state_bytes(optimizer // (2 * FLOAT32))["portions"]
    return replace(
        before,
        adapters=round(before.adapters * share),
        optimizer=optimizer,
        importance=portions if before.importance else 0,  # averages are given up
        gradients=before.gradients,
    )
