"""The ``adapter`` section of tests that do the same with several methods."""

from __future__ import annotations

from typing import Any

from adalora_dist.config.methods import MethodConfig, method_config, settings_of


def adapter_section(method: str = "adalora", **common: Any) -> MethodConfig:
    """The section of a method, of settings that a test has for all methods: each takes what it has."""
    return method_config(method, **settings_of(method, common))
