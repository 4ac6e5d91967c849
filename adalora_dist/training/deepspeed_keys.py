"""Names that a DeepSpeed configuration may have, the values that they may have, and which of them a recipe does not do.

``deepspeed_settings`` goes through a file by these tables, and a test compares them with DeepSpeed's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """Values that a setting may have."""

    said: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _one_of(*words: str) -> Kind:
    return Kind(" or ".join(f'"{word}"' for word in words), lambda value: value in words)


_FLAG = Kind("true or false", lambda value: isinstance(value, bool))
_COUNT = Kind("an integer from 0", lambda value: _is_number(value) and value == int(value))  # 5e8 is one
_NUMBER = Kind("a number from 0", _is_number)
_SECTION = Kind("a section in braces", lambda value: isinstance(value, dict))
_ANY = Kind("anything", lambda value: True)
_TYPE = _one_of("fp32", "bf16", "fp16")
_DEVICE = _one_of("none", "cpu")
_MEAN = _one_of("mean")
_TRUE = Kind("true", lambda value: value is True)
_WHOLE = Kind("1, because DeepSpeed steps the rest with an optimizer of its own", lambda value: value == 1)
_STAGE = Kind("0, 1, 2 or 3", lambda value: type(value) is int and 0 <= value <= 3)

KEYS: dict[str, dict[Kind, str]] = {
    "": {
        _COUNT: "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps vocabulary_size",
        _NUMBER: "gradient_clipping gradient_predivide_factor",
        _FLAG: "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer wall_clock_breakdown memory_breakdown "
        "dump_state disable_python_gc disable_allgather use_data_before_expert_parallelism prescale_gradients",
        _TYPE: "communication_data_type seq_parallel_communication_data_type",
        _MEAN: "gradient_allreduce_op",
        _SECTION: "zero_optimization fp16 bf16 flops_profiler comms_logger timers aio data_types",
        _TRUE: "managed_gradient_accumulation",
        _ANY: "log_level",
    },
    "zero_optimization": {
        _STAGE: "stage",
        _FLAG: "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions overlap_comm "
        "compute_grad_norm load_from_fp32_weights elastic_checkpoint ignore_unused_parameters round_robin_gradients "
        "parameter_alignment memory_efficient_linear pipeline_loading_checkpoint override_module_apply "
        "log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory cpu_offload_use_pin_memory "
        "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save "
        "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential",
        _COUNT: "reduce_bucket_size allgather_bucket_size sub_group_size stage3_prefetch_bucket_size "
        "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters "
        "stage3_max_reuse_distance",
        _SECTION: "offload_optimizer offload_param",
    },
    "zero_optimization.offload_optimizer": {
        _DEVICE: "device",
        _FLAG: "pin_memory pipeline_read pipeline_write fast_init",
        _COUNT: "buffer_count",
        _NUMBER: "cpuadam_cores_perc",
        _WHOLE: "ratio",
        _ANY: "nvme_path",
    },
    "zero_optimization.offload_param": {
        _DEVICE: "device",
        _FLAG: "pin_memory",
        _COUNT: "buffer_count buffer_size max_in_cpu",
        _ANY: "nvme_path",
    },
    "fp16": {
        _FLAG: "enabled auto_cast consecutive_hysteresis",
        _COUNT: "initial_scale_power loss_scale_window hysteresis min_loss_scale",
        _NUMBER: "loss_scale",
    },
    "bf16": {_FLAG: "enabled immediate_grad_update check_grad_overflow"},
    "data_types": {_TYPE: "grad_accum_dtype", _ANY: "keep_in_fp32_modules"},
    "flops_profiler": {
        _FLAG: "enabled detailed",
        _COUNT: "profile_step top_modules",
        _ANY: "module_depth output_file recompute_fwd_factor",
    },
    "comms_logger": {_FLAG: "enabled prof_all verbose debug", _ANY: "prof_ops"},
}
"""What is known, by section and kind; "" is outside of all. Into other sections DeepSpeed looks itself."""

_REMOVED = "DeepSpeed has removed it, and does not train with it"
_ROUNDED = "ranks would be allocated by rounded numbers; --quantization of a recipe quantises frozen weights"
_AS_ONE = "what is gathered as one is done with its backward before its adapters have their gradients"
_NO_STAGES = "processes share out rows, and hold shards of weights (stage 3), not parts of a layer or of a sequence"
REFUSED = {
    "optimizer": "the recipe makes its own: set --learning-rate, --weight-decay",
    "scheduler": "the recipe makes its own: set --lr-schedule, --lr-warmup-ratio",
    "activation_checkpointing": "models of transformers do not ask it: give the recipe --gradient-checkpointing, with "
    "--offload-activations in place of cpu_checkpointing",
    "tensorboard": "it would log a scaled loss: give the recipe --trackers tensorboard",
    "wandb": "it would log a scaled loss: give the recipe --trackers wandb",
    "comet": "it would log a scaled loss: give the recipe --trackers comet_ml",
    "csv_monitor": "it would log a scaled loss: the run's folder has every step in metrics.jsonl",
    "data_efficiency": "rows are dealt out by the recipe",
    "dataloader_drop_last": "rows are dealt out by the recipe",
    "autotuning": "it ends a run after some steps; adalora-dist plan says what fits",
    "pipeline": "a recipe's model has no stages",
    "tensor_parallel": _NO_STAGES,
    "sequence_parallel_size": _NO_STAGES,
    "data_parallel_size": _NO_STAGES,
    "expert_parallel": "experts are sharded by stage 3, as all weights are",
    "hybrid_engine": "it is for generation between the steps of RLHF",
    "compile": "under DeepSpeed nothing is compiled; --compile is for DDP and FSDP2",
    "torch_autocast": "the compute type is the recipe's: set --precision",
    "weight_quantization": "set --quantization, which quantises frozen weights",
    "data_types.param_dtype": "the types are the recipe's: set --precision, --dtype",
    "data_types.buffer_dtype": "the types are the recipe's: set --precision, --dtype",
    "fp16.fp16_master_weights_and_grads": "what is trained is held in float32",
    "bf16.bf16_master_weights_and_grads": "what is trained is held in float32",
    "bf16.bf16_optimizer_states": "what is trained is held in float32",
    "zero_optimization.zero_hpz_partition_size": "the second copy of the weights would be one that nothing "
    "was written to",
    "zero_optimization.zero_quantized_weights": _ROUNDED,
    "zero_optimization.zero_quantized_nontrainable_weights": _ROUNDED,
    "zero_optimization.zero_quantized_gradients": _ROUNDED,
    "zero_optimization.leaf_module": _AS_ONE,
    "zero_optimization.stage3_module_granularity_threshold": _AS_ONE,
    "zero_optimization.zenflow": "it steps weights outside of the optimizer",
    "zero_optimization.offload_optimizer.super_offload": "it steps weights in another process",
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.zeropp_loco_param": _REMOVED,
    "zero_optimization.legacy_stage1": _REMOVED,
    "zero_optimization.cpu_offload": 'in place of it write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'in place of it write "offload_param": {"device": "cpu"}',
    "bfloat16": 'in place of it write "bf16"',
    "amp": "set --precision",
    "nebula": _REMOVED,
    "compression_training": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_gradients": _REMOVED,
    "eigenvalue": _REMOVED,
    "sparse_attention": _REMOVED,
    "elasticity": _REMOVED,
    "graph_harvesting": _REMOVED,
    "curriculum_learning": _REMOVED,
    "progressive_layer_drop": _REMOVED,
}
"""What a recipe does not do, by its place, and what does it instead. Fine where it asks for nothing, and left out."""
NOT_USED = {
    "steps_per_print": "--log-every says how often a line is logged",
    "checkpoint": "checkpoints are this project's own",
    "datastates_ckpt": "checkpoints are this project's own",
}
"""What changes no number of a run, and is done in another way."""
_FAR = 'moments would lie where ranks cannot be allocated in them; use "cpu" or "none"'
_ZERO = "zero_optimization"
IN_ANY_LOOP = {
    place: REFUSED[place]
    for place in (
        f"{_ZERO}.zero_hpz_partition_size",
        f"{_ZERO}.zero_quantized_weights",
        f"{_ZERO}.zero_quantized_nontrainable_weights",
        f"{_ZERO}.zero_quantized_gradients",
        f"{_ZERO}.zenflow",
        f"{_ZERO}.offload_optimizer.super_offload",
        "tensor_parallel",
        "sequence_parallel_size",
        "expert_parallel",
        "hybrid_engine",
    )
} | {
    f"{_ZERO}.offload_optimizer.device": _FAR,
    f"{_ZERO}.offload_param.device": _FAR,
    f"{_ZERO}.offload_optimizer.ratio": "DeepSpeed would step the rest with an optimizer of its own",
}
"""What is refused in loops that are not the recipes', too."""
BESIDE = frozenset(
    "gradient_accumulation_steps gradient_clipping zero_stage zero3_save_16bit_model offload_optimizer_device "
    "offload_param_device offload_optimizer_nvme_path offload_param_nvme_path".split()
)
"""What accelerate's section says without a file, and what a file says itself."""
FILLED = frozenset(
    f"{_ZERO}.{name}"
    for name in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
)
"""The "auto" that accelerate knows, from the model's width."""
