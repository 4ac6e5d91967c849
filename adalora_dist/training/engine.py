"""One ``Accelerator`` for what the launcher asked for, on GPUs and on CPU, or a refusal: never silently less."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    is_aim_available,
    is_clearml_available,
    is_comet_ml_available,
    is_dvclive_available,
    is_mlflow_available,
    is_swanlab_available,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)
from torch import nn

from adalora_dist.backbones.parts import input_embeddings
from adalora_dist.backbones.precision import computed_in
from adalora_dist.config.activations import check_activations_engine
from adalora_dist.config.compilation import check_compile_engine
from adalora_dist.config.engines import check_prefetch_engine
from adalora_dist.config.sections import RunConfig, TrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.io.launchers import OWN_COMMAND
from adalora_dist.io.redaction import redacted, redacted_command
from adalora_dist.io.terminal import keep_from_listeners
from adalora_dist.training.asked_for import check_asked_for, precision_asked_for
from adalora_dist.training.deepspeed_settings import fill_sizes, filled, is_deepspeed, not_used, settings_asked_for
from adalora_dist.training.launch import is_true
from adalora_dist.training.rendezvous import init_method

ConfigT = TypeVar("ConfigT", bound=RunConfig)

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_TRACKER_INSTALLED = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "trackio": is_trackio_available,
    "mlflow": is_mlflow_available,
    "swanlab": is_swanlab_available,
    "comet_ml": is_comet_ml_available,
    "aim": is_aim_available,
    "clearml": is_clearml_available,
    "dvclive": is_dvclive_available,
}


def with_precision(config: ConfigT) -> ConfigT:
    """``config`` with the compute type in place of ``precision`` auto: the launcher's mixed_precision, or, where it has
    none, bf16 on a GPU that computes in it, and fp32 elsewhere.

    Raises:
        UserError: a mixed_precision that there is not.
    """
    if config.train.precision != "auto":
        return config
    train = config.train.model_copy(update={"precision": precision_asked_for() or computed_in("auto")})
    return config.model_copy(update={"train": train})


def build_accelerator(train: TrainConfig, environment: Mapping[str, str] = os.environ) -> Accelerator:
    """The accelerator of this process.

    On a machine without GPU, accelerate starts what its launcher was told to start, but then treats FSDP and
    DeepSpeed as plain data parallelism or as unconnected single processes. Here the process state is made first, so
    that it joins all processes over gloo and FSDP2 and DeepSpeed are what they say.

    Raises:
        UserError: the launcher promised more processes than it started, or an engine that cannot be had here.
    """
    world_size = int(environment.get("WORLD_SIZE", 1))
    use_fsdp = is_true(environment, "ACCELERATE_USE_FSDP")
    use_deepspeed = is_deepspeed(environment)
    on_cpu = not _has_gpu() or is_true(environment, "ACCELERATE_USE_CPU")
    _refuse_missing_processes(environment)
    check_asked_for(environment)
    if train.precision == "fp16" and on_cpu:
        raise UserError("precision=fp16 needs a GPU: use fp32 or bf16 on CPU")

    check_compile_engine(train.compile, use_deepspeed)
    check_prefetch_engine(train.fsdp_prefetch, use_fsdp and world_size > 1)
    plugin = _deepspeed_plugin(train, environment) if use_deepspeed else None
    with _port_in_use_named(environment):
        accelerator = _started(train, on_cpu, use_fsdp and world_size > 1, plugin, environment)
    _check(accelerator, world_size, use_fsdp, use_deepspeed)
    check_activations_engine(train, engine_name(accelerator))
    if (asked := precision_asked_for(environment)) not in ("", computed_in(train.precision)):
        accelerator.print(f"mixed_precision {asked} of the launcher is not used: precision is {train.precision}")
    for line in not_used(environment) if use_deepspeed else ():
        accelerator.print(line)
    return accelerator


def _started(
    train: TrainConfig, on_cpu: bool, use_fsdp: bool, plugin: DeepSpeedPlugin | None, environment: Mapping[str, str]
) -> Accelerator:
    """The process group, and the accelerator over it."""
    AcceleratorState._reset_state()  # of an earlier run of this process, which may have had another precision
    meeting = init_method(environment)
    if on_cpu:
        _use_all_cores(environment)
        if plugin is not None:
            _prepare_deepspeed_on_cpu()
            PartialState(backend="gloo", **meeting)
        else:
            os.environ["ACCELERATE_USE_CPU"] = "true"
            PartialState(cpu=True, **meeting)
        if use_fsdp:
            # accelerate promotes to FSDP from the accelerator types only.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Accelerator(
        cpu=on_cpu and plugin is None,
        deepspeed_plugin=plugin,
        mixed_precision=_PRECISION[computed_in(train.precision)],
        log_with=_installed_trackers(train.trackers),
        project_dir=train.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(**meeting)] if meeting else None,
        # The loop cuts batches itself and takes every scale into its own loss; accelerate only has to hold back the
        # gradient reduction until the last micro-step.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=num_micro_steps(train, int(environment.get("WORLD_SIZE", 1))),
            adjust_scheduler=False,
            sync_with_dataloader=False,
        ),
    )


@contextmanager
def _port_in_use_named(environment: Mapping[str, str]) -> Iterator[None]:
    """Two launches on one machine meet at the same port by default: say which flag gives the second its own."""
    try:
        yield
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        flag = "--main_process_port" if _from_accelerate(environment) else "--master_port"
        if OWN_COMMAND in environment:
            raise UserError(
                f"port {environment.get('MASTER_PORT')} is in use on this machine, most likely by another run: add a "
                f"free port from 1024 to 65535, --main-address {environment.get('MASTER_ADDR')}:PORT, on every machine"
            ) from error
        raise UserError(
            f"port {environment.get('MASTER_PORT')} is in use on this machine, most likely by another run: give the "
            f"launcher {flag} N, a free port from 1024 to 65535"
        ) from error


def start_trackers(accelerator: Accelerator, config: RunConfig) -> None:
    """Open a run with every tracker of ``train.trackers``, with the resolved configuration as its parameters."""
    if config.train.trackers:
        sections = config.model_dump(mode="json").items()
        flat = {
            f"{section}.{key}": redacted(str(value)) for section, values in sections for key, value in values.items()
        }
        words = sys.argv
        sys.argv = redacted_command(words)  # trackers keep the command line, too
        try:
            accelerator.init_trackers("adalora-dist", config=flat)
        finally:
            sys.argv = words
        keep_from_listeners()


def num_micro_steps(train: TrainConfig, world_size: int, length: int | None = None) -> int:
    """Forward and backward passes per optimizer step: the fewest that respect the limits of a micro-batch.

    Args:
        length: tokens of every row. Without it ``micro_batch_tokens`` tells no number: then it is 2 if there can be
            several, so that engines make ready to add gradients up (:func:`begin_accumulation` counts).
    """
    if train.micro_batch_tokens and length is None:
        return min(2, -(-train.batch_size // world_size))
    rows = max(1, train.micro_batch_tokens // (length or 1)) if train.micro_batch_tokens else train.micro_batch_size
    return -(-train.batch_size // (rows * world_size))


def begin_accumulation(accelerator: Accelerator, num_micro_steps: int) -> int:
    """The next so many backward passes are one optimizer step. Returns the number by which the engine divides losses.

    It is this number, but under DeepSpeed, which divides by the one it was built with.
    """
    accelerator.step, accelerator.gradient_accumulation_steps = 0, num_micro_steps
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return int(AcceleratorState().deepspeed_plugin.deepspeed_config["gradient_accumulation_steps"])
    return num_micro_steps


def engine_name(accelerator: Accelerator) -> str:
    """What runs, in a word of ``config.engines.ENGINES``; or zero0, data parallelism in DeepSpeed's hands."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        return "fsdp2"
    return "ddp" if accelerator.num_processes > 1 else "single"


def fill_deepspeed_sizes(accelerator: Accelerator, model: nn.Module) -> None:
    """Before ``accelerator.prepare``: sizes that DeepSpeed's settings leave to the model. Nothing on other engines."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        fill_sizes(zero, getattr(model, "config", None))


@contextmanager
def tied_weights_in_one_group(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Around ``accelerator.prepare``: under FSDP2, what a third module shares stays in the root's group.

    accelerate makes a group of input embeddings and output head. Where other modules share their weight, as the
    encoder and the decoder of BART do, or the head's bias, as around BERT's, it would lie in two groups, which torch
    refuses. It also asks models that have no such embeddings (CANINE). No effect elsewhere.
    """
    embeddings = input_embeddings(model)
    has_weight = getattr(embeddings, "weight", None) is not None
    ends = [embeddings, getattr(model, "get_output_embeddings", lambda: None)()]
    inside = {module for end in ends if end is not None for module in end.modules()}
    own = {p for module in inside for p in module.parameters(recurse=False)}
    is_shared = any(p in own for m in model.modules() if m not in inside for p in m.parameters(recurse=False))
    hidden = accelerator.distributed_type == DistributedType.FSDP and (not has_weight or is_shared)
    names = ("get_input_embeddings", "get_output_embeddings") if hidden else ()
    for name in names:
        setattr(model, name, lambda: None)
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)


def _installed_trackers(names: Sequence[str]) -> list[str] | None:
    """accelerate drops a tracker that is not installed without a word."""
    for name in names:
        if not _TRACKER_INSTALLED[name]():
            package = "'adalora-dist[track]'" if name in ("tensorboard", "wandb", "trackio") else name
            raise UserError(f"trackers={name} is not installed: pip install {package} or leave it out")
    return list(names) or None  # it warns of an empty list


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _use_all_cores(environment: Mapping[str, str]) -> None:
    """accelerate's launcher gives a process one thread where nobody asked for more; share out the cores instead."""
    if _from_accelerate(environment) and environment.get("OMP_NUM_THREADS") == "1":
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, num_cores // int(environment.get("LOCAL_WORLD_SIZE", 1))))


def _from_accelerate(environment: Mapping[str, str]) -> bool:
    return "ACCELERATE_MIXED_PRECISION" in environment


def _refuse_missing_processes(environment: Mapping[str, str]) -> None:
    """``accelerate launch --cpu --num_processes 2`` sets a master address and, without MPI, starts one process."""
    connected = any(name in environment for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
    if _from_accelerate(environment) and "MASTER_ADDR" in environment and not connected:
        raise UserError(
            "accelerate was asked for several processes but started one (on CPU it needs MPI for --cpu): use "
            "accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes N"
        )


def _prepare_deepspeed_on_cpu() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from deepspeed.ops import __compatible_ops__
    except ImportError as error:
        raise UserError(
            "DeepSpeed was asked for and is not installed: pip install 'adalora-dist[deepspeed]'"
        ) from error
    # Its shared-memory collectives would be compiled for a minute; gloo does the same job here.
    __compatible_ops__["deepspeed_shm_comm"] = False


def _check(accelerator: Accelerator, world_size: int, use_fsdp: bool, use_deepspeed: bool) -> None:
    if accelerator.num_processes != world_size:
        raise UserError(
            f"the launcher started {world_size} processes, but accelerate joined {accelerator.num_processes}: "
            "launch with accelerate launch, torchrun or the deepspeed launcher"
        )
    kind = accelerator.distributed_type
    if use_fsdp and world_size > 1 and kind != DistributedType.FSDP:
        raise UserError(f"FSDP2 was asked for, but accelerate set up {kind.value}: check the accelerate configuration")
    if use_deepspeed and kind != DistributedType.DEEPSPEED:
        raise UserError(f"DeepSpeed was asked for, but accelerate set up {kind.value}: do not pass --cpu or use_cpu")


def _deepspeed_plugin(train: TrainConfig, environment: Mapping[str, str]) -> DeepSpeedPlugin:
    """What accelerate hands to DeepSpeed: the settings that the launcher asks for, with the recipe's values in them."""
    num_processes = int(environment.get("WORLD_SIZE", 1))
    num_steps, precision = num_micro_steps(train, num_processes), computed_in(train.precision)
    settings = filled(settings_asked_for(environment), train, num_processes, num_steps, precision)
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # looked at; accelerate refuses even what agrees
    return DeepSpeedPlugin(hf_ds_config=settings)
