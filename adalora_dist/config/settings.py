"""The settings of a schema, as flags spell them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from pydantic.fields import FieldInfo

from adalora_dist.config.methods import METHODS, MethodConfig
from adalora_dist.config.sections import RunConfig

RESERVED = ("config", "local-rank", "help", "help-all")
"""Flags that are no settings."""


class Setting(NamedTuple):
    """One field of one section of the schema."""

    section: str
    name: str
    info: FieldInfo


def settings_by_flag(schema: type[RunConfig], method: str | None = None) -> dict[str, Setting]:
    """Every setting under its flag, without the leading dashes: ``{"target-rank": Setting("adapter", ...), ...}``.

    Args:
        schema: ``RunConfig`` or a recipe's subclass of it.
        method: whose settings the ``adapter`` section has; None: those of all methods.

    Raises:
        TypeError: two settings have one flag.
    """
    settings: dict[str, Setting] = {}
    for section, section_info in schema.model_fields.items():
        kind: Any = section_info.annotation
        fields: Iterable[tuple[str, FieldInfo]] = kind.model_fields.items()
        if kind is MethodConfig:
            configs = METHODS.values() if method is None else [METHODS[method]]
            own = [("method", method_setting(section_info.get_default(call_default_factory=True).method))]
            fields = itertools.chain(own, *(config.model_fields.items() for config in configs))
        taken = set(settings)
        for name, info in fields:
            renamed = (getattr(extra, "name", None) for extra in info.metadata)  # by tyro.conf.arg(name=...)
            flag = (next(filter(None, renamed), None) or name).replace("_", "-")
            if flag in taken or flag in RESERVED:
                raise TypeError(f"{schema.__name__}: two settings are called --{flag}; rename {section}.{name}")
            settings.setdefault(flag, Setting(section, name, info))
    return settings


def method_setting(default: str) -> FieldInfo:
    """The setting ``method``, which takes the name of any method; a section's own takes one."""
    said = "; ".join(f"{name}: {(config.__doc__ or '').splitlines()[0]}" for name, config in METHODS.items())
    return FieldInfo(
        annotation=Literal[tuple(METHODS)],  # type: ignore[arg-type]
        default=default,
        description=f"What is trained. {said}. --method NAME --help shows the settings of one.",
    )


def owners(key: Any, settings: Mapping[str, Setting]) -> list[str]:
    """Where a key belongs that was put into the wrong section or spelt as its flag: ``adapter.alpha``."""
    return [f"{setting.section}.{setting.name}" for flag, setting in settings.items() if key in (setting.name, flag)]
