"""The ZeRO optimizer, made anew for smaller adapters. Like ``zero.py``, this reads attributes and imports nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adalora_dist.sharding.base import Shrink
from adalora_dist.sharding.zero import KINDS, STAGE_3

# What stage 3 leaves on every module for its backward; bound to the optimizer that made it, and not made anew if there.
_BACKWARD_HOOKS = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining")


def shrink_zero(engine: Any, shrinks: Sequence[Shrink]) -> None:
    """Put smaller parameters, all 0, in the place of those there are; between two steps. Collective.

    The flat buffers of the ZeRO optimizer are made for its parameters, so the DeepSpeed engine gets a new one, in the
    way its constructor makes it, around the same torch optimizer. Its state and the masters' values are lost: whoever
    calls this keeps and restores them. The engine stays the same object; frozen parameters stay as they are, those of
    stage 3 partitioned.
    """
    zero = engine.optimizer
    inner, kind = zero.optimizer, next(kind for kind in KINDS if hasattr(zero, kind[0]))
    groups = getattr(zero, kind[1])
    for group in inner.param_groups:
        group["params"] = []
    for index, params in enumerate(groups):
        inner.param_groups[zero.sub_group_to_group_id[index] if kind == STAGE_3 else index]["params"] += params
    if kind == STAGE_3:
        zero.parameter_offload.partition_all_parameters()
        for module in engine.module.modules():
            for name in _BACKWARD_HOOKS:
                module.__dict__.pop(name, None)
    zero.destroy()
    inner.state.clear()
    for shrink in shrinks:
        old: Any = shrink.parameter
        shape = old.ds_shape if kind == STAGE_3 else old.shape
        new = shrink.replace(shape, inner, dtype=old.dtype, device=engine.device)
        if kind == STAGE_3 and new is not None:
            old.convert_to_zero_parameters(param_list=[new])
    engine.param_names = {p: name for name, p in engine.module.named_parameters()}
    engine._configure_optimizer(inner, None)
    if hasattr(zero, "loss_scaler"):
        engine.optimizer.loss_scaler = zero.loss_scaler
    if engine._support_torch_style_backward:
        engine.optimizer.register_grad_acc_post_hook(engine._backward_post_hook)
