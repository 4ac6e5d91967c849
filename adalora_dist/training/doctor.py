"""``adalora-dist doctor``: what is installed, what this machine has, and what is missing for which feature.

In a form to paste into an issue: one block, without names of folders under the home folder, and without secrets.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from packaging.requirements import Requirement

from adalora_dist.io.build_tools import missing_build_tool
from adalora_dist.io.cache import cache_folder
from adalora_dist.io.errors import printable
from adalora_dist.io.redaction import redacted

PACKAGE = "adalora-dist"
FEATURES = {
    "demo": "demonstrations with SmolLM2-135M-Instruct",
    "deepspeed": "DeepSpeed ZeRO: --engine zero2, zero3",
    "quant": "4-bit and 8-bit backbones: --quantization",
    "fp8": "float8 backbones: --quantization fp8",
    "eval": "metrics of GLUE, SQuAD, summaries and E2E",
    "captions": "METEOR, CIDEr and NIST of E2E",
    "plots": "pictures: inspect, push",
    "track": "tensorboard, wandb, trackio: --trackers",
}
"""Extras of the package by what they are for; those of developers are left out."""
LAUNCHERS = ("accelerate", "torchrun", "deepspeed", "srun")


class Package(NamedTuple):
    """A package that is wanted, and the one that is there."""

    name: str
    wanted: str
    """Versions, such as ``<2.16,>=2.11``."""
    found: str | None

    @property
    def problem(self) -> str:
        """Empty where there is none."""
        if self.found is None:
            return "missing"
        is_wanted = Requirement(f"{self.name}{self.wanted}").specifier.contains(self.found, prereleases=True)
        return "" if is_wanted else f"{self.found} is outside of what is tested, {self.wanted}"


def version_line() -> str:
    """Of this package and those that matter most, without importing any."""
    words = [f"{name} {version}" for name in ("torch", "transformers", "accelerate") if (version := _version(name))]
    return ", ".join(
        [f"{PACKAGE} {_version(PACKAGE) or 'not installed'}", *words, f"Python {platform.python_version()}"]
    )


def doctor() -> tuple[str, bool]:
    """The report, and whether all that every run needs is there."""
    wanted = packages()
    problems = [package for package in wanted[""] if package.problem]
    lines = [version_line(), platform.platform(), "", "Packages"]
    lines += [f"  {p.name:18} {p.found or '-':16} {p.wanted:16} {p.problem}".rstrip() for p in wanted[""]]
    broken = _reason_of_torch()
    devices = [f"  torch cannot be imported: {broken}"] if broken else _devices()
    compiles = [] if broken else [_compiles()]
    lines += ["", "Features", *_features(wanted), *compiles, "", "Devices", *devices, "", "Launchers"]
    lines += [f"  {name:18} {_home(shutil.which(name) or 'not found')}" for name in LAUNCHERS]
    lines += ["", "Disk", *_disk(), "", "Environment", *_environment(), ""]
    verdict = "All that a run needs is there."
    if problems:
        named = " ".join(f"'{p.name}{p.wanted}'" for p in problems)
        verdict = f"A run needs what is not there: pip install {named}"
    elif broken:
        verdict = "A run needs torch, which cannot be imported: install it again"
    elif not wanted[""]:
        verdict = f"{PACKAGE} is not installed, so that nobody says what a run needs: pip install {PACKAGE}"
    return redacted("\n".join([*lines, verdict])), not (problems or broken) and bool(wanted[""])


def packages() -> dict[str, list[Package]]:
    """What the package requires by extra; under "" what every run needs."""
    found: dict[str, list[Package]] = {"": [], **{extra: [] for extra in FEATURES}}
    try:
        requirements = [Requirement(line) for line in metadata.requires(PACKAGE) or []]
    except metadata.PackageNotFoundError:
        return found
    for requirement in requirements:
        package = Package(requirement.name, str(requirement.specifier), _version(requirement.name))
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found[""].append(package)
            continue
        for extra in FEATURES:
            if requirement.marker.evaluate({"extra": extra}):
                found[extra].append(package)
    return found


def _features(wanted: dict[str, list[Package]]) -> Iterator[str]:
    for extra, what in FEATURES.items():
        lacking = [f"{package.name}: {package.problem}" for package in wanted[extra] if package.problem]
        remedy = f"{', '.join(lacking)}; pip install '{PACKAGE}[{extra}]'" if lacking else "ready"
        yield f"  {what:43} {remedy}"


def _compiles() -> str:
    import torch

    missing = missing_build_tool(torch.cuda.is_available())
    return f"  {'compiled blocks: --compile':43} {f'missing: {missing}' if missing else 'ready'}"


def _reason_of_torch() -> str:
    """Why torch cannot be imported, libraries of CUDA that it does not find among others; empty where it can."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        return printable(error)
    return ""


def _devices() -> Iterator[str]:
    import torch

    memory = psutil.virtual_memory()
    yield f"  CPU: {psutil.cpu_count()} cores, {_size(memory.available)} of {_size(memory.total)} memory available"
    if not torch.cuda.is_available():
        yield f"  no GPU that this torch can use (built for CUDA {torch.version.cuda or 'none'})"
        return
    for index in range(torch.cuda.device_count()):
        about: Any = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        kind = f"compute capability {about.major}.{about.minor}, {bf16}, CUDA {torch.version.cuda}"
        yield f"  GPU {index}: {about.name}, {_size(about.total_memory)}, {kind}"


def _disk() -> Iterator[str]:
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    for what, folder in (("working folder", Path.cwd()), ("demonstrations", cache_folder()), ("Hub's files", hub)):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        state = "" if existing == folder else " (not there yet)"
        yield f"  {what:18} {_home(str(folder))}{state}, {_size(shutil.disk_usage(existing).free)} free"


def _environment() -> Iterator[str]:
    """Settings of others that change what a run does; never their secrets."""
    names = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "DS_ACCELERATOR", "NCCL_DEBUG")
    named = [f"  {name}={os.environ[name]}" for name in names if name in os.environ]
    yield from named or ["  nothing of note"]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _home(text: str) -> str:
    home = str(Path.home())
    return "~" + text[len(home) :] if text.startswith(home + os.sep) else text
