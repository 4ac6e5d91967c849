"""Legal values of a setting in words, and what to do about others."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from adalora_dist.config.foreign_names import flag_here
from adalora_dist.io.errors import printable


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
        if names := getattr(getattr(check, "func", None), "names", ()):  # config.data.Known
            return list(names)
    return [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []


def must_be(info: FieldInfo, detail: ErrorDetails) -> str:
    """What a setting must be, and what to do about the value that pydantic has refused."""
    finite = "finite, " if detail["type"] == "finite_number" else ""
    return f"must be {finite}{legal(info)}; {remedy(info, detail['input'])}"


def mistake(section: str, infos: Mapping[str, FieldInfo], error: ValidationError) -> str:
    """The first mistake in the arguments of a class of settings, in one line, and how many more there are.

    Args:
        section: the class's name.
        infos: its settings by name.
    """
    details = error.errors(include_url=False)
    of_settings = {detail["loc"][:1] or (number,) for number, detail in enumerate(details)}
    more = f" (and {len(of_settings) - 1} more)" if len(of_settings) > 1 else ""
    return _mistake(section, infos, details[0], details[0]["loc"]) + more


def _mistake(section: str, infos: Mapping[str, FieldInfo], detail: ErrorDetails, place: tuple[int | str, ...]) -> str:
    name = str(place[0]) if place else ""
    own: Any = getattr(infos[name].annotation, "model_fields", None) if name in infos else None
    if own is not None and len(place) > 1:  # of a section within
        return _mistake(f"{section}.{name}", own, detail, place[1:])
    if detail["type"] == "extra_forbidden":
        here = flag_here(name, [other.replace("_", "-") for other in infos]).removeprefix("--").replace("-", "_")
        alike = " or ".join(near(name, list(infos)))
        hint = f"here: {here}" if here else f"did you mean {alike}?" if alike else f"help({section}) lists all"
        return f"{section} has no {name}: {hint}"
    reason = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else None
    if not place or own is not None:  # a rule over several settings, which its message names
        return reason or detail["msg"]
    value = f"{name}={printable(repr(detail['input']), 80)}"
    if reason or name not in infos:  # of a method
        return f"{value}: {reason or detail['msg']}"
    return f"{value}: {must_be(infos[name], detail)}"
