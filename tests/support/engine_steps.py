"""DeepSpeed around a small model, and one step that is the same under every engine."""

from __future__ import annotations

from typing import Any

import torch

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


def backward_and_step(engine: str, model: Any, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One optimizer step from one loss. Under ZeRO the model is DeepSpeed's engine."""
    if engine.startswith("zero"):
        model.backward(loss)
        model.step()
    else:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
