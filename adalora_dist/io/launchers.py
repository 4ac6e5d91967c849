"""What started this process: launchers, which print after it has ended, and whose own end it must not outlast."""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

POLL_SECONDS = 0.5
OWN_COMMAND = "ADALORA_DIST_COMMAND"
"""Environment variable: the words of ``adalora-dist run`` that started this process, as JSON.

That is no launcher like those below: it prints nothing after its processes."""
OWN_OPTIONS = "ADALORA_DIST_OPTIONS"
"""Environment variable: options of the command that started this recipe, which may stand among the recipe's flags, so
that a hint can name them: words with spaces between."""
RESTARTS = "ADALORA_DIST_RESTARTS"
"""Environment variable: how often ``adalora-dist run`` has started this program again."""
_COUNTS = (RESTARTS, "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
_NAMES = ("accelerate", "deepspeed", "torchrun")
_MODULES = {
    "accelerate.commands.accelerate_cli": "accelerate",
    "accelerate.commands.launch": "accelerate",
    "deepspeed.launcher.runner": "deepspeed",
    "deepspeed.launcher.launch": "deepspeed",
    "torch.distributed.launch": "torchrun",
    "torch.distributed.run": "torchrun",
}
_MARKS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "CROSS_RANK")
"""Environment variables that accelerate, torchrun and DeepSpeed's launcher set, and hardly anybody else."""

_followers: list[Callable[[], None]] = []
_watching: int | None = None
"""The process whose thread watches: a fork has a copy of this number, and no thread."""


def options_among_flags(options: argparse.ArgumentParser) -> None:
    """Let the recipe that this process or its children run know them, for its hints."""
    names = [name for action in options._actions for name in action.option_strings if name.startswith("--")]
    os.environ[OWN_OPTIONS] = " ".join(name.removeprefix("--") for name in names)


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Started by a launcher, whose end means that nobody waits for this process any more."""
    return "LOCAL_RANK" in environment or "ACCELERATE_MIXED_PRECISION" in environment


def is_restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """Started again by a launcher or a scheduler, after an earlier attempt, with nobody looking on."""
    return any(environment.get(name, "0") not in ("", "0") for name in _COUNTS)


def launchers() -> list[tuple[psutil.Process, list[str]]]:
    """Those among this process's ancestors, nearest first, each with its command line from the launcher's name on.

    The last one is what the user started, and what ends last.
    """
    found = []
    try:
        for parent in psutil.Process().parents():
            if command := _command_of(parent.cmdline()):
                found.append((parent, command))
    except psutil.Error:  # of another user, or gone
        pass
    return found


def _command_of(words: list[str]) -> list[str] | None:
    for index, word in enumerate(words[:2]):
        if Path(word).name in _NAMES:
            return [Path(word).name, *words[index + 1 :]]
    for index, word in enumerate(words[1:4], start=1):
        if word in _MODULES and words[index - 1] == "-m":
            return [_MODULES[word], *words[index + 1 :]]
    return None


def follow(on_gone: Callable[[], None]) -> None:
    """Have ``on_gone`` called, by a thread, when the launcher is gone, instead of who asked before.

    Does nothing in a process that was not launched. :func:`unfollow` ends it.
    """
    global _watching
    if not is_launched():
        return
    _followers.append(on_gone)
    if _watching != os.getpid():
        _watching = os.getpid()
        threading.Thread(target=_watch, args=(_parents(),), name="launcher", daemon=True).start()


def unfollow(on_gone: Callable[[], None]) -> None:
    """Who asked before ``on_gone`` is called again. Does nothing if it was not asked for."""
    if on_gone in _followers:
        _followers.remove(on_gone)


def _watch(parents: list[int]) -> None:
    global _watching
    orphaned = _is_orphan()
    while not orphaned and _parents() == parents:
        time.sleep(POLL_SECONDS)
    _watching = None
    if _followers:
        _followers[-1]()


def _is_orphan() -> bool:
    """Whether the launcher was gone before anybody could look: it has left its marks, and init has this process."""
    if not any(mark in os.environ for mark in _MARKS) or launchers():
        return False
    try:
        return os.getppid() == 1 or psutil.Process(os.getppid()).name() == "systemd"
    except psutil.Error:
        return True


def _parents() -> list[int]:
    """This process's parent, and where that is the half of DeepSpeed's launcher that starts processes, the other half,
    which the user sees and ends."""
    parent = os.getppid()
    try:
        process = psutil.Process(parent)
        return [parent, process.ppid()] if "deepspeed.launcher.launch" in process.cmdline() else [parent]
    except psutil.Error:
        return [parent]
