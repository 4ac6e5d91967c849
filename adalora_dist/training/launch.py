"""From a launch script to its recipe, under DeepSpeed.

``deepspeed launch/summarize_bart.sh`` makes the launcher run that file with Python, once per process, with
``--local_rank=N`` added. The scripts are bash and Python at once: their Python half calls :func:`run_recipe`. Nothing
here imports torch, so that a mistake in a flag is told at once.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adalora_dist.config.flags import user_errors
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import read_object
from adalora_dist.io.shipped import ROOT, own_or_shipped

CONFIG_FLAG = "--deepspeed-config"


def run_recipe(name: str, default_config: str = "zero2") -> None:
    """Run ``recipes/NAME.py`` as the main program, with the flags of this one.

    Args:
        name: of a recipe beside the folder that the launch script lies in, or of a shipped one.
        default_config: of ``ds_configs``, without suffix; ``--deepspeed-config FILE`` among the flags names another.

    A mistake ends the program with one line and code 2.
    """
    root = Path(sys.argv[0]).resolve().parents[1]
    root = root if (root / "recipes" / f"{name}.py").is_file() else ROOT  # a script that was copied elsewhere
    with user_errors():
        path, flags = _take_config(sys.argv[1:], root / "ds_configs" / f"{default_config}.json")
        os.environ.update(deepspeed_environment(own_or_shipped(path)))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_of_each(int(os.environ.get("LOCAL_SIZE", 1)))))
    recipe = root / "recipes" / f"{name}.py"
    sys.argv = [str(recipe), *flags]
    runpy.run_path(str(recipe), run_name="__main__")


def deepspeed_environment(path: Path) -> dict[str, str]:
    """What tells accelerate, in a process's environment, to use DeepSpeed with this configuration.

    Raises:
        UserError: ``path`` is no DeepSpeed configuration.
    """
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true" if zero_stage(path) == 3 else "false",
    }


def deepspeed_file(name: str) -> Path:
    """The DeepSpeed configuration that an environment names. In launch/accelerate/*.yaml paths are relative to the
    repository's root, which need not be the working folder.

    Raises:
        UserError: the file is neither there nor among those that are shipped.
    """
    if Path(name).is_file():
        return Path(name)
    at_root = Path(sys.argv[0]).resolve().parents[1] / name
    found = at_root if at_root.is_file() else own_or_shipped(Path(name))
    if not found.is_file():
        raise UserError(
            f"deepspeed_config_file {name}: no such file, here or in {at_root.parents[1]}: give a full path"
        )
    return found


def threads_of_each(num_processes: int) -> int:
    """Of so many processes on this machine; else each would take all of its cores."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, num_cores // num_processes)


def _take_config(arguments: list[str], default: Path) -> tuple[Path, list[str]]:
    """The DeepSpeed configuration, and the arguments without its flag."""
    rest, path = [], default
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") != CONFIG_FLAG:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("--"):
            raise UserError(f"{CONFIG_FLAG} has no value: give it a file, such as ds_configs/zero3.json")
        path = Path(value)
    return path, rest


def zero_stage(path: Path) -> int:
    """The stage of ZeRO in a DeepSpeed configuration; 0 where there is none.

    Raises:
        UserError: ``path`` is no JSON.
    """
    zero = read_configuration(path).get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else 0
    return stage if isinstance(stage, int) else 0  # what else stands there, deepspeed_settings refuses


def read_configuration(path: Path) -> dict[str, Any]:
    """A DeepSpeed configuration, as it stands there.

    Raises:
        UserError: ``path`` is no JSON.
    """
    try:
        return read_object(path)
    except UserError as error:
        raise UserError(
            f"{CONFIG_FLAG} {path}: no DeepSpeed configuration ({error}); give a JSON file, such as "
            "ds_configs/zero3.json"
        ) from error


def is_true(environment: Mapping[str, str], name: str) -> bool:
    """Whether accelerate takes the variable for set."""
    return environment.get(name, "false").lower() == "true"
