"""The settings of a schema, as flags spell them, and their legal values in words."""

from __future__ import annotations

import difflib
import itertools
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from adalora_dist.config.data import Known
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


# ------------------------------------------------------------------------------------------------------------ in words


def near(word: str, candidates: Sequence[str]) -> list[str]:
    """Up to three candidates, most alike first; ``lr`` finds ``learning-rate`` by its initials."""
    initials = [c for c in candidates if "".join(part[:1] for part in re.split("[-_]", c)) == word]
    return [*dict.fromkeys([*initials, *difflib.get_close_matches(word, candidates, n=3, cutoff=0.6)])][:3]


def legal(info: FieldInfo) -> str:
    """The legal values of a setting, in words: ``a number > 0``, ``one of fp32, bf16, fp16``."""
    choices = ", ".join(choices_of(info))
    if get_origin(info.annotation) is tuple:
        return f"one or more of {choices}" if choices else "a list of words (in YAML: [a, b])"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text (in YAML: in quotes)"}
    legal = f"one of {choices}" if choices else ", or ".join([*_words(info), words[kind_of(info)]])
    optional = ", or none" if type(None) in get_args(info.annotation) else ""
    return " ".join([legal, " and ".join(_bounds(info))]).strip() + optional


def remedy(info: FieldInfo, value: Any = None) -> str:
    """What to do about a value that is not legal."""
    if alike := difflib.get_close_matches(str(value), choices_of(info), n=1):
        return f"did you mean {alike[0]}?"
    default = info.get_default()
    if isinstance(default, bool):
        default = str(default).lower()
    if isinstance(default, tuple):
        default = " ".join(default)
    return f"leave it out for the default, {default}" if default not in (None, "") else "or leave it out"


def _bounds(info: FieldInfo) -> Iterator[str]:
    symbols = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}  # annotated_types.Gt has an attribute gt, and so on
    parts = get_args(info.annotation) if is_union(info) else ()
    of_parts = (
        field for part in parts for field in getattr(part, "__metadata__", ())
    )  # of Annotated[int, Field(ge=0)]
    limits = [*info.metadata, *(limit for field in of_parts for limit in getattr(field, "metadata", ()))]
    return (f"{symbols[n]} {getattr(limit, n)}" for limit in limits for n in symbols if hasattr(limit, n))


def is_union(info: FieldInfo) -> bool:
    """Whether a setting takes values of several types: a number or none, a word or a number."""
    return get_origin(info.annotation) in (Union, types.UnionType)


def kind_of(info: FieldInfo) -> Any:
    """The type of a setting without the ``None``, or the words, that it may also take."""
    if not is_union(info):
        return info.annotation
    kinds = [kind for kind in get_args(info.annotation) if kind is not type(None)]
    kind = next((kind for kind in kinds if get_origin(kind) is not Literal), kinds[0])
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _words(info: FieldInfo) -> list[str]:
    """The words that a setting takes besides values of its type."""
    kinds = get_args(info.annotation) if is_union(info) and get_origin(kind_of(info)) is not Literal else ()
    return [str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]


def choices_of(info: FieldInfo) -> list[str]:
    """The words of a setting (or of each element of a list) that takes one of a few."""
    kind = get_args(info.annotation)[0] if get_origin(info.annotation) is tuple else kind_of(info)
    for check in (*info.metadata, *getattr(kind, "__metadata__", ())):
        if isinstance(known := getattr(check, "func", None), Known):
            return list(known.names)
    return [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
