"""What the launcher of a process asks for in its environment, and what of that a run does.

accelerate's configuration can ask for more than a recipe does by it: that is refused here, not passed over. DeepSpeed's
is gone through in ``deepspeed_settings``. Nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from adalora_dist.io.errors import UserError
from adalora_dist.training.deepspeed_settings import is_deepspeed, precision_of, settings_asked_for
from adalora_dist.training.launch import is_true

PARALLELISM = "PARALLELISM_CONFIG_"
"""How accelerate's variables with the sizes of its parallelism_config begin."""


def engine_asked_for(environment: Mapping[str, str] = os.environ) -> str:
    """What a run with this environment would start, in a word of ``config.engines.ENGINES``.

    Raises:
        UserError: DeepSpeed's configuration is none.
    """
    num_processes = int(environment.get("WORLD_SIZE", 1))
    if is_deepspeed(environment) and (stage := settings_asked_for(environment)["zero_optimization"]["stage"]):
        return f"zero{stage}"
    if num_processes == 1:
        return "single"
    return "fsdp2" if is_true(environment, "ACCELERATE_USE_FSDP") else "ddp"


def copies_asked_for(environment: Mapping[str, str] = os.environ) -> int:
    """How many copies of the sharded weights there are: several under HSDP, else one.

    Raises:
        UserError: copies of what is not sharded, sizes that are not those of the processes, or parallelism of another
            kind, which would train on the wrong rows, or do nothing.
    """
    if not is_true(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        return 1
    sizes = {
        kind: int(environment.get(f"{PARALLELISM}{kind.upper()}_SIZE", 1))
        for kind in ("dp_replicate", "dp_shard", "tp", "cp", "sp")
    }
    for kind in ("tp", "cp", "sp"):
        if sizes[kind] != 1:
            raise UserError(
                f"parallelism_config_{kind}_size {sizes[kind]}: must be 1; processes share out rows and hold shards of "
                "weights (launch/accelerate/fsdp2.yaml, hsdp.yaml), not parts of a layer or of a sequence"
            )
    copies, shards = sizes["dp_replicate"], sizes["dp_shard"]
    num_processes = int(environment.get("WORLD_SIZE", 1))
    if copies * shards != num_processes:
        raise UserError(
            f"parallelism_config_dp_replicate_size {copies}, parallelism_config_dp_shard_size {shards}: must multiply "
            f"to the {num_processes} process(es); set both in the file, or as flags of accelerate launch"
        )
    if copies > 1 and (shards == 1 or engine_asked_for(environment) != "fsdp2"):
        raise UserError(
            f"parallelism_config_dp_replicate_size {copies} without shards: those are FSDP2's, over two or more "
            "processes (launch/accelerate/hsdp.yaml); for whole copies take launch/accelerate/ddp.yaml"
        )
    return copies


def engine_said(engine: str, environment: Mapping[str, str] = os.environ) -> str:
    """As reports call it: hsdp where FSDP2 has copies."""
    return "hsdp" if engine == "fsdp2" and copies_asked_for(environment) > 1 else engine


def precision_asked_for(environment: Mapping[str, str] = os.environ) -> str:
    """accelerate's mixed_precision, bf16 or fp16; nothing where it is "no", which its files have by default. Or what
    DeepSpeed's configuration says, which may be fp32, too.

    Raises:
        UserError: another one, or both have one.
    """
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("no", "bf16", "fp16"):
        raise UserError(
            f"mixed_precision {asked} of the launcher: must be no, bf16 or fp16; frozen weights in float8 are "
            "--quantization fp8"
        )
    of_deepspeed = precision_of(settings_asked_for(environment)) if is_deepspeed(environment) else ""
    if asked != "no" and of_deepspeed not in ("", asked):
        raise UserError(
            f"mixed_precision {asked} of the launcher, and {of_deepspeed} of the DeepSpeed configuration: leave one to "
            'the other, with "no" here or "auto" there'
        )
    return of_deepspeed if asked == "no" else asked


def check_asked_for(environment: Mapping[str, str] = os.environ) -> None:
    """
    Raises:
        UserError: the launcher asks for what a recipe decides by its own settings, or for what there is not.
    """
    copies_asked_for(environment)
    precision_asked_for(environment)
    if (backend := environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()) != "no":
        raise UserError(
            f"dynamo_backend {backend} of the launcher: the model as a whole is not compiled; set it to no, and give "
            "the recipe --compile, which compiles its blocks"
        )
    uses_fsdp = is_true(environment, "ACCELERATE_USE_FSDP")
    if uses_fsdp and environment.get("FSDP_VERSION", "1") != "2":
        raise UserError("FSDP_VERSION=1 is not supported: set fsdp_version: 2 in the accelerate configuration")
    if uses_fsdp and (policy := environment.get("FSDP_AUTO_WRAP_POLICY", "")) == "SIZE_BASED_WRAP":
        raise UserError(
            f"fsdp_auto_wrap_policy {policy}: FSDP2 cannot wrap the lists that layers are in; set it to "
            "TRANSFORMER_BASED_WRAP in the accelerate configuration"
        )
    if is_true(environment, "ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("Megatron-LM of the launcher: there are ddp, fsdp2, hsdp, zero1, zero2 and zero3; choose one")
