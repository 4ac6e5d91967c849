"""The ZeRO optimizer, made anew for smaller adapters. Like ``zero.py``, this reads attributes and imports nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adalora_dist.sharding.base import Shrink

# What stage 3 leaves on every module for its backward; bound to the optimizer that made it, and not made anew if there.
_BACKWARD_HOOKS = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining")


def rebuild_smaller(
    engine: Any, groups: Sequence[Sequence[torch.Tensor]], is_stage_3: bool, shrinks: Sequence[Shrink]
) -> None:
    """Put smaller parameters, all 0, in the place of those there are; between two steps. Collective.

    The flat buffers of the ZeRO optimizer are made for its parameters, so the DeepSpeed engine gets a new one, in the
    way its constructor makes it, around the same torch optimizer. Its state and the masters' values are lost: whoever
    calls this keeps and restores them. The engine stays the same object; frozen parameters stay as they are, those of
    stage 3 partitioned.

    Args:
        engine: DeepSpeed's.
        groups: the model's parameters by ZeRO's groups (sub-groups in stage 3).
        is_stage_3: whether parameters are partitioned.
        shrinks: all of trained parameters.
    """
    zero = engine.optimizer
    inner = zero.optimizer
    for group in inner.param_groups:
        group["params"] = []
    for index, params in enumerate(groups):
        inner.param_groups[zero.sub_group_to_group_id[index] if is_stage_3 else index]["params"] += params
    if is_stage_3:
        zero.parameter_offload.partition_all_parameters()
        for module in engine.module.modules():
            for name in _BACKWARD_HOOKS:
                module.__dict__.pop(name, None)
    zero.destroy()
    inner.state.clear()
    for shrink in shrinks:
        old: Any = shrink.parameter
        shape = old.ds_shape if is_stage_3 else old.shape
        new = shrink.replace(shape, inner, dtype=old.dtype, device=engine.device)
        if is_stage_3 and new is not None:
            old.convert_to_zero_parameters(param_list=[new])
    engine.param_names = {p: name for name, p in engine.module.named_parameters()}
    engine._configure_optimizer(inner, None)
    if hasattr(zero, "loss_scaler"):
        engine.optimizer.loss_scaler = zero.loss_scaler
    if engine._support_torch_style_backward:
        engine.optimizer.register_grad_acc_post_hook(engine._backward_post_hook)
