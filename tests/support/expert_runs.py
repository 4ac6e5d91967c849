"""A run over experts under any engine: two layers of a real architecture, one expert that no token goes to, and one
that only the rows of the last rank go to; or any of the nine mixtures, routed as they route."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers as tf
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adalora_dist import AdaLoraConfig, adapt, attach
from tests.support.engine_steps import backward_and_step, zero_engine
from tests.support.expert_models import MIXTURES, SIZES, mixture

STEPS, GLOBAL_BATCH, LENGTH = 8, 6, 6
UNUSED, OF_LAST = 3, 2
"""Experts of the first layer: no token goes to the one; to the other go tokens of the batch's last rows alone."""
SETTINGS = AdaLoraConfig(
    init_rank=3, target_rank=1.5, alpha=6, targets=("experts", "q_proj"), initial_warmup_steps=1, final_steps=3,
    mask_interval_steps=1,
)  # fmt: skip


class Case(NamedTuple):
    engine: str
    world_size: int = 1
    accumulation: int = 1
    clip: float = 0.0
    dtype: torch.dtype = torch.float32
    persist: int = 0
    options: tuple[str, ...] = ()
    kind: str = ""
    """Of the mixtures; none: Qwen3-MoE with the routes of :class:`Routed`."""


def model_and_router() -> tuple[Any, Any]:
    """The first token id of a row, odd or even, decides whether expert ``OF_LAST`` is among the first layer's two."""
    torch.manual_seed(0)
    config = tf.Qwen3MoeConfig(
        **SIZES, num_experts_per_tok=2, moe_intermediate_size=10, intermediate_size=24, num_experts=4, head_dim=8
    )
    model = tf.Qwen3MoeForCausalLM(config)
    model.config.use_cache = False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.normal_(std=0.3)
    return model, model.model.layers[0].mlp.gate


def rows(step: int) -> torch.Tensor:
    return torch.randint(3, 32, (GLOBAL_BATCH, LENGTH), generator=torch.Generator().manual_seed(100 + step))


class Routed(nn.Module):
    """Sends the rows whose number is in ``last`` to experts 0 and ``OF_LAST``, the others to 0 and 1."""

    def __init__(self, gate: Any) -> None:
        super().__init__()
        self.gate, self.is_last = gate, torch.zeros(0, dtype=torch.bool)

    def forward(self, hidden_states: torch.Tensor) -> Any:
        logits, weights, _ = self.gate(hidden_states)
        second = torch.where(self.is_last, OF_LAST, 1).repeat_interleave(LENGTH)
        chosen = torch.stack([torch.zeros_like(second), second], dim=1)
        return logits, weights, chosen


def run(rank: int, world_size: int, case: Case) -> dict[str, Any]:
    settings, routed = SETTINGS, None
    if case.kind:
        model, settings = mixture(case.kind), SETTINGS.model_copy(update={"targets": ("experts",)})
    else:
        model, gate = model_and_router()
        routed = model.model.layers[0].mlp.gate = Routed(gate)
    adapt(model, settings)
    if case.engine == "fsdp2":
        mesh = init_device_mesh("cpu", (world_size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer: Any = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    hooks = attach(model, optimizer, settings, STEPS)
    plain: Any = model
    if case.engine == "ddp":
        model = DistributedDataParallel(model)
    elif case.engine.startswith("zero"):
        model, optimizer = zero_engine(case, GLOBAL_BATCH, model, optimizer), None
    losses = []
    for step in range(STEPS):
        ids = rows(step).chunk(world_size)[rank]
        if routed is not None:
            routed.is_last = (torch.arange(GLOBAL_BATCH) >= GLOBAL_BATCH - 1).chunk(world_size)[rank]
        loss = model(input_ids=ids, labels=ids).loss
        backward_and_step(case.engine, model, optimizer, loss)
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world_size)
        hooks.replace(model, optimizer)
    hooks.finish()
    step_of_method: Any = hooks.method_step
    return {
        "losses": losses,
        "patterns": {a.step: a.keep.tolist() for a in step_of_method.allocations},
        "ranks": hooks.rank_pattern(),
        "held": [layer.ranks for layer in step_of_method.layers],
        "deltas": {update.name: update.delta() for update in hooks.updates()},
        "class": type(plain).__name__,
    }


def run_all(rank: int, world_size: int, case: Case) -> dict[str, dict[str, Any]]:
    """Every mixture, one after the other."""
    return {kind: run(rank, world_size, case._replace(kind=kind)) for kind in MIXTURES}
