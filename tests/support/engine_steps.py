"""DeepSpeed around a small model, and one step that is the same under every engine."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.support.ranks import import_deepspeed


def zero_engine(case: Any, global_batch: int, model: Any, optimizer: torch.optim.Optimizer) -> Any:
    """DeepSpeed's engine as ``case`` says: engine, world_size, accumulation, clip, dtype, persist, options."""
    zero: dict[str, Any] = {"stage": int(case.engine[-1])}
    if zero["stage"] == 3:
        zero |= {"stage3_param_persistence_threshold": case.persist}
    if "sub_groups" in case.options:
        zero |= {"sub_group_size": 40}
    if "offload" in case.options:
        zero |= {"offload_optimizer": {"device": "cpu"}}
        if zero["stage"] == 3:
            zero |= {"offload_param": {"device": "cpu"}}
    settings = {
        "train_micro_batch_size_per_gpu": global_batch // case.world_size // case.accumulation,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case.dtype == torch.bfloat16},
    }
    return import_deepspeed().initialize(model=model, optimizer=optimizer, config=settings)[0]


def shard_blocks(model: Any) -> None:
    """FSDP2 on each of ``model.blocks``, and on the rest."""
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)


def wrapped(engine: str, model: Any, optimizer: Any, micro_batch: int, persist: int = 0) -> tuple[Any, Any]:
    """Model and optimizer as the engine has them: DDP and ZeRO wrap both, the others neither.

    Args:
        micro_batch: sequences of a process in one forward.
        persist: parameters of fewer elements stay whole under ZeRO-3.
    """
    if engine == "ddp":
        return DistributedDataParallel(model), optimizer
    if not engine.startswith("zero"):
        return model, optimizer
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "zero_optimization": {"stage": int(engine[-1]), "stage3_param_persistence_threshold": persist},
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1 by itself
        "zero_allow_untested_optimizer": True,
    }
    model, around, *_ = import_deepspeed().initialize(model=model, optimizer=optimizer, config=settings)
    return model, around


def backward_and_step(engine: str, model: Any, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One optimizer step from one loss. Under ZeRO the model is DeepSpeed's engine."""
    if engine.startswith("zero"):
        model.backward(loss)
        model.step()
    else:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
