"""``adalora-dist run``: a recipe on the processes that an engine takes, without a launcher's own words.

What launchers put into the environment of a process is put there, and nothing is printed: a run's own lines, or its
one line of error, are all there is, and its exit code is this program's. Nothing here imports torch, so that a mistake
is told at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from adalora_dist.config.engines import copies_of_hsdp
from adalora_dist.io.ending import EXIT_PREEMPTED
from adalora_dist.io.errors import UserError
from adalora_dist.io.launchers import OWN_COMMAND, RESTARTS
from adalora_dist.io.processes import free_port, run_together
from adalora_dist.io.shipped import own_or_shipped, shipped
from adalora_dist.io.signals import SIGNALS
from adalora_dist.io.yaml_file import read_yaml
from adalora_dist.training.asked_for import PARALLELISM
from adalora_dist.training.launch import deepspeed_environment, threads_of_each
from adalora_dist.training.recipe_file import check_flags, recipe_file

DEFAULT_PORT = 29500
"""Where processes of several machines meet; those of one take any that is free."""
_DEVICES = ("/dev/nvidia0", "/dev/kfd", "/dev/dri/renderD128", "/dev/dxg")
"""One of them is there where a GPU is: without, torch need not be imported to count."""
_FINAL_CODES = (0, 2, EXIT_PREEMPTED, *(128 + number for number in SIGNALS))
"""Exit codes after which nothing is started again: done, a mistake that would be made again, told to end."""


class Placement(NamedTuple):
    """Which processes run where; None: to be found out."""

    engine: str | None = None
    num_processes: int | None = None
    """On each machine."""
    num_nodes: int | None = None
    node_rank: int | None = None
    address: str | None = None
    """HOST or HOST:PORT of the first machine."""
    deepspeed_config: Path | None = None
    num_restarts: int = 0
    """How often the run is started again, from its newest checkpoint, when a process has failed."""


def start(recipe: str, placement: Placement, flags: Sequence[str], command: Sequence[str]) -> NoReturn:
    """Run a recipe, and end as it ends.

    Args:
        recipe: name of a shipped one, or a Python file.
        flags: of the recipe.
        command: what was typed, for the run's folder.

    Raises:
        UserError: a recipe or an engine that there is not, or a placement that does not say where.
        SystemExit: with the exit code of the process that failed first, or 0.
    """
    path, flags = recipe_file(recipe), list(flags)
    if placement.num_restarts:
        _refuse_restarts_elsewhere(placement)
        flags = _resumed(flags)
    common = {**os.environ, OWN_COMMAND: json.dumps(list(command))}
    words = [sys.executable, str(path), *flags]
    sys.stdout.flush()
    for attempt in range(placement.num_restarts + 1):
        again = {RESTARTS: str(attempt)} if attempt else {}
        environments = [{**common, **again, **own} for own in environments_of(placement, os.environ)]
        if len(environments) == 1 and not placement.num_restarts:  # nothing to hold together: the process is the run
            os.execve(sys.executable, words, environments[0])
        if not attempt and len(environments) > 1 and environments[0]["RANK"] == "0":
            check_flags(path, flags)
        code = run_together(words, environments, EXIT_PREEMPTED)
        if code in _FINAL_CODES or attempt == placement.num_restarts:
            break
        print(
            f"adalora-dist run: ended with code {code}; restart {attempt + 1} of {placement.num_restarts}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    raise SystemExit(code)


def _refuse_restarts_elsewhere(placement: Placement) -> None:
    if (placement.num_nodes or 1) > 1:
        raise UserError(
            f"--restarts {placement.num_restarts} with --nodes {placement.num_nodes}: of several machines each would "
            "restart by itself; use torchrun --max-restarts, or launch/slurm.sh with RESTARTS"
        )


def _resumed(flags: list[str]) -> list[str]:
    """The recipe's flags, with which a start continues what is there."""
    given = [
        word.partition("=")[2] or " ".join(flags[at + 1 : at + 2])
        for at, word in enumerate(flags)
        if word.partition("=")[0] == "--resume"
    ]
    if given and given[-1] != "auto":
        raise UserError(f"--restarts with --resume {given[-1]}: a restart continues its own run; leave --resume out")
    return flags if given else [*flags, "--resume", "auto"]


def environments_of(placement: Placement, surroundings: Mapping[str, str]) -> list[dict[str, str]]:
    """What the environment of each process on this machine has besides ``surroundings``.

    Raises:
        UserError: see :func:`start`.
    """
    num_nodes, node_rank, host = _nodes(placement, surroundings)
    on_each = placement.num_processes or _num_gpus()
    engine = placement.engine or ("ddp" if on_each * num_nodes > 1 else "single")
    if engine == "single" and on_each * num_nodes > 1:
        raise UserError(
            f"--engine single with {on_each} processes on {num_nodes} machine(s): it is one process; choose another "
            "engine, such as ddp or fsdp2"
        )
    own = engine_environment(engine, placement.deepspeed_config)
    if engine == "hsdp":
        copies = copies_of_hsdp(on_each, num_nodes)
        own |= _parallelism({"dp_replicate_size": copies, "dp_shard_size": on_each * num_nodes // copies})
    if "OMP_NUM_THREADS" not in surroundings:
        own["OMP_NUM_THREADS"] = str(threads_of_each(on_each))
    if engine == "single":
        return [own]
    name, port = _meeting_point(host, num_nodes)
    own |= {"MASTER_ADDR": name, "MASTER_PORT": port, "WORLD_SIZE": str(on_each * num_nodes)}
    own |= {"LOCAL_WORLD_SIZE": str(on_each), "LOCAL_SIZE": str(on_each)}
    return [
        {**own, "LOCAL_RANK": str(local), "RANK": str(node_rank * on_each + local)} for local in range(on_each)
    ]  # fmt: skip


def engine_environment(engine: str, deepspeed_config: Path | None = None) -> dict[str, str]:
    """What the engine's file in launch/accelerate makes accelerate's launcher put into a process's environment.

    Raises:
        UserError: no such engine, or a DeepSpeed configuration of another one.
    """
    config: Mapping[Any, Any] = {} if engine == "single" else read_yaml(shipped("engine", engine, ["single"]))[0]
    kind = config.get("distributed_type")
    if deepspeed_config is not None and kind != "DEEPSPEED":
        raise UserError(f"--deepspeed-config {deepspeed_config} with --engine {engine}: choose zero2 or zero3")
    if kind == "DEEPSPEED":
        given = deepspeed_config or Path(config["deepspeed_config"]["deepspeed_config_file"])
        own = deepspeed_environment(own_or_shipped(given, "deepspeed"))
        if (own["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "true") != (engine == "zero3"):
            found = "is not 3: set it, or choose zero2" if engine == "zero3" else "is 3: choose zero3, or another file"
            raise UserError(f"--engine {engine} with --deepspeed-config {given}, whose zero_optimization.stage {found}")
        return own
    if kind == "FSDP":
        settings = {key.upper(): value for key, value in config["fsdp_config"].items()}
        words = {key: str(v).lower() if isinstance(v, bool) else str(v) for key, v in settings.items()}
        sizes = {key.removeprefix("parallelism_config_"): v for key, v in config.get("parallelism_config", {}).items()}
        return {"ACCELERATE_USE_FSDP": "true", **words, **_parallelism(sizes)}
    return {}


def _parallelism(sizes: Mapping[str, int]) -> dict[str, str]:
    words = {f"{PARALLELISM}{name.upper()}": str(size) for name, size in sizes.items()}
    return {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", **words} if words else {}


def _nodes(placement: Placement, surroundings: Mapping[str, str]) -> tuple[int, int, str]:
    """Number of machines, this one's number, address of the first; SLURM's where it started this."""
    num_nodes, rank, host = placement.num_nodes or 1, placement.node_rank, placement.address
    if placement.num_nodes is None and (rank or host):
        given = f"--node-rank {rank}" if rank else f"--main-address {host}"
        raise UserError(f"{given} without --nodes: say how many")
    if rank is not None and rank >= num_nodes:
        raise UserError(f"--node-rank {rank} of --nodes {num_nodes}: must be 0 to {num_nodes - 1}")
    if num_nodes == 1:
        return 1, 0, "127.0.0.1"
    if "SLURM_NODEID" in surroundings and int(surroundings.get("SLURM_NNODES", 1)) > 1:
        rank = int(surroundings["SLURM_NODEID"]) if rank is None else rank
        host = _first_host(surroundings.get("SLURM_JOB_NODELIST", "")) if host is None else host
    if rank is None or host is None:
        lacking = "--node-rank K" if rank is None else "--main-address HOST"
        raise UserError(
            f"--nodes {num_nodes} without {lacking}: run the same line on every machine, with its number from 0 and "
            "the address of machine 0; under srun both are known"
        )
    if rank >= num_nodes:
        raise UserError(f"--nodes {num_nodes} on machine {rank} of the SLURM job: give --nodes the job's own number")
    return num_nodes, rank, host


def _first_host(nodes: str) -> str | None:
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(done.stdout.split()), None)


def _meeting_point(host: str, num_nodes: int) -> tuple[str, str]:
    name, _, port = host.rpartition(":") if host.count(":") == 1 else (host, "", "")
    if not port:
        return name, str(free_port() if num_nodes == 1 else DEFAULT_PORT)
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--main-address {host}: the port must be an integer from 1 to 65535; write HOST or HOST:PORT")
    return name, port


def _num_gpus() -> int:
    """Of this machine, and at least 1."""
    if not any(Path(device).exists() for device in _DEVICES):
        return 1
    import torch

    return max(1, torch.cuda.device_count())
