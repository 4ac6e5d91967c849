"""The ``adapter`` section of tests that do the same with several methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adalora_dist.config.methods import MethodConfig, method_config, settings_of


def adapter_section(method: str = "adalora", **common: Any) -> MethodConfig:
    """The section of a method, of settings that a test has for all methods: each takes what it has."""
    return method_config(method, **settings_of(method, common))


def adapter_flags(words: Sequence[str], **common: Any) -> list[str]:
    """The same for a command line: flags of common settings, for the method that ``words`` choose."""
    method = words[words.index("--method") + 1] if "--method" in words else "adalora"
    settings = settings_of(method, common)
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
