"""From a command line and a YAML file to a validated run, and from a user's mistake to one line.

Order of precedence: the schema's defaults, then a row of the recipe's table of presets (``presets.py``), then
``--config file.yaml``, then flags (of a repeated flag the last). All become one nested mapping that pydantic validates,
so a mistake reads the same wherever it was made; tyro renders ``--help`` from the same schema. Nothing here imports
torch: a typing error must not cost half a minute.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn, TypeVar, Union, get_args, get_origin

import tyro
from pydantic import Field, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from adalora_dist.config.presets import PresetTable
from adalora_dist.config.sections import RunConfig
from adalora_dist.io.errors import UserError
from adalora_dist.io.yaml_file import read_yaml

ConfigT = TypeVar("ConfigT", bound=RunConfig)

RANK0_HEAD_START_SECONDS = 5.0
"""How long other ranks wait before they report: launchers end them once rank 0 has reported the same mistake."""


class Setting(NamedTuple):
    """One field of one section of the schema."""

    section: str
    name: str
    info: FieldInfo


def parse_config(
    schema: type[ConfigT], argv: list[str] | None = None, description: str = "", table: Path | None = None
) -> ConfigT:
    """The run that the command line asks for.

    Args:
        schema: ``RunConfig`` or a recipe's subclass of it.
        argv: arguments without the program's name; None: ``sys.argv[1:]``.
        description: first paragraph of ``--help``.
        table: YAML file of the recipe's presets; gives it the flags ``--preset`` and what else picks a row.

    Raises:
        SystemExit: code 0 after ``--help``; code 2 after a mistake, told in one line on standard error.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "--help" in arguments or "-h" in arguments:
        _print_help(schema, description, table)
    try:
        return _parse(schema, arguments, table)
    except UserError as error:
        fail(error)


def fail(error: object) -> NoReturn:
    """Print ``error: <one line>`` on standard error and exit with code 2.

    Of several ranks (``RANK``, or else ``LOCAL_RANK``, in the environment) rank 0 speaks first, and launchers then end
    the others. A rank that is still alive after ``RANK0_HEAD_START_SECONDS`` failed alone, and says so.
    """
    line = " ".join(str(error).split())
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"
    if rank != "0":
        time.sleep(RANK0_HEAD_START_SECONDS)
        line = f"rank {rank}: {line}"
    print(f"error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ``UserError`` into :func:`fail`; let everything else propagate. A context manager and a decorator."""
    try:
        yield
    except UserError as error:
        fail(error)


def _print_help(schema: type[RunConfig], description: str, path: Path | None) -> NoReturn:
    config_flag: Any = (
        Annotated[str, tyro.conf.arg(metavar="FILE.yaml")],
        Field("", description="YAML file with nested sections; flags override what it sets."),
    )
    table = PresetTable(path, tuple(schema.model_fields)) if path else None
    picks: Any = {}
    if table is not None:
        for axis in table.axes_besides(_settings(schema)):
            words = ", ".join(table.words(axis))
            picks[axis] = (str, Field("", description=f"Picks a row of {table.path.name}: {words}."))
    with_config: Any = create_model(schema.__name__, __base__=schema, config=config_flag, **picks)
    tyro.cli(with_config, args=["--help"], description=description, config=(tyro.conf.OmitArgPrefixes,))
    raise AssertionError("unreachable: tyro exits after --help")


def _parse(schema: type[ConfigT], arguments: Sequence[str], path: Path | None) -> ConfigT:
    settings = _settings(schema)
    table = PresetTable(path, tuple(schema.model_fields)) if path else None
    picks = table.axes_besides(settings) if table else []
    given = _split(arguments, settings, picks)
    # What a recipe's schema presets in a section must survive when the user sets another field of that section.
    values = {
        name: section.get_default(call_default_factory=True).model_dump(exclude_unset=True)
        for name, section in schema.model_fields.items()
    }
    origins: dict[tuple[str, str], str] = {}
    from_file: dict[str, dict[str, Any]] = {section: {} for section in values}
    if "config" in given:
        _merge_yaml(schema, Path(given.pop("config")[0]), from_file, origins)
    picked = {axis: given.pop(axis)[0] for axis in picks if axis in given}
    if table is not None and picked:
        for axis in (a for a in table.axes if a not in picks):  # a setting that picks rows, too
            section, name, info = settings[axis]
            known = {name: info.get_default()} | values[section] | from_file[section]
            picked[axis] = given[axis][0] if axis in given else str(known[name])
        _merge(table.resolve(picked), values)
    _merge(from_file, values)
    for flag, words in given.items():
        setting = settings[flag]
        values[setting.section][setting.name] = _flag_value(setting.info, words)
        origins[setting.section, setting.name] = f"--{flag} {' '.join(words)}"
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, schema, origins)) from None


def _settings(schema: type[RunConfig]) -> dict[str, Setting]:
    """Every setting under its flag, without the leading dashes: ``{"target-rank": Setting("adapter", ...), ...}``."""
    settings: dict[str, Setting] = {}
    for section, section_info in schema.model_fields.items():
        assert section_info.annotation is not None
        for name, info in section_info.annotation.model_fields.items():
            renamed = (getattr(extra, "name", None) for extra in info.metadata)  # by tyro.conf.arg(name=...)
            flag = (next(filter(None, renamed), None) or name).replace("_", "-")
            if flag in settings or flag in ("config", "local-rank", "help"):
                raise TypeError(f"{schema.__name__}: two settings are called --{flag}; rename {section}.{name}")
            settings[flag] = Setting(section, name, info)
    return settings


# ------------------------------------------------------------------------------------------------ the command line


def _split(
    arguments: Sequence[str], settings: Mapping[str, Setting], picks: Sequence[str] = ()
) -> dict[str, list[str]]:
    """Flags as typed, ``{"epochs": ["3"], "tasks": ["boolq", "piqa"]}``; ``--no-x`` becomes ``{"x": ["false"]}``.

    ``picks`` are flags that pick a row of a table of presets.
    """
    switches = {f"no-{flag}": flag for flag, setting in settings.items() if setting.info.annotation is bool}
    given: dict[str, list[str]] = {}
    words: list[str] | None = None
    for argument in arguments:
        if not re.match(r"-(?![\d.])", argument):  # -1 and -.5 are values
            if words is None:
                raise UserError(f"{argument!r} stands before any flag: write --flag value, see --help")
            words.append(argument)
            continue
        typed, equals, value = argument.partition("=")
        flag = typed.removeprefix("--").replace("_", "-")
        words = [value] if equals else []
        if typed.startswith("--") and flag in switches:
            if equals:
                raise UserError(f"{typed} takes no value: write {typed} or --{switches[flag]}")
            flag, words = switches[flag], ["false"]
        elif not typed.startswith("--") or flag not in (*settings, *picks, "config", "local-rank"):
            near = _near(flag.rpartition(".")[2].lstrip("-"), [*settings, *switches, *picks, "config"])
            hint = f"did you mean --{' or --'.join(near)}?" if near else "see --help for all of them"
            raise UserError(f"{typed} is not a flag: {hint}")
        if flag == "config" and flag in given:
            raise UserError("--config is given twice: give one file, and flags for what differs")
        given[flag] = words
    for flag, words in given.items():
        _check_arity(flag, words, settings[flag].info if flag in settings else None)
    given.pop("local-rank", None)  # appended by launchers; the rank is read from the environment
    return given


def _check_arity(flag: str, words: list[str], info: FieldInfo | None) -> None:
    takes_list = info is not None and get_origin(info.annotation) is tuple
    if info is not None and info.annotation is bool and not words:
        words.append("true")
    if not words or "" in words:  # an empty word is mostly a shell variable that was never set
        legal = _legal(info) if info else {"config": "the path of a YAML file", "local-rank": "an integer"}.get(flag)
        legal = legal or "a row of the recipe's table"
        hint = ", or the word none for an empty list" if takes_list else ""
        raise UserError(f"--{flag} has no value: give it {legal}{hint}")
    if len(words) > 1 and not takes_list:
        raise UserError(f"--{flag} takes one value and got {len(words)}: {' '.join(words)}; keep one of them")


def _flag_value(info: FieldInfo, words: list[str]) -> Any:
    is_none = words in (["none"], ["None"])
    if get_origin(info.annotation) is tuple:
        return [] if is_none else words
    return None if is_none and type(None) in get_args(info.annotation) else words[0]


def _near(word: str, candidates: Sequence[str]) -> list[str]:
    """Up to three candidates, most alike first; ``lr`` finds ``learning-rate`` by its initials."""
    initials = [c for c in candidates if "".join(part[:1] for part in re.split("[-_]", c)) == word]
    return [*dict.fromkeys([*initials, *difflib.get_close_matches(word, candidates, n=3, cutoff=0.6)])][:3]


# -------------------------------------------------------------------------------------------------- the YAML file


def _merge_yaml(
    schema: type[RunConfig], path: Path, values: dict[str, dict[str, Any]], origins: dict[tuple[str, str], str]
) -> None:
    """Put the file's settings into ``values``, and ``file:line: section.key: value`` of each into ``origins``."""
    sections, lines = read_yaml(path)
    settings = _settings(schema)
    for section, content in sections.items():
        where = f"{path}:{lines[section,]}"
        if section not in schema.model_fields:
            near = _owners(section, settings) or _near(str(section), list(schema.model_fields))
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(f"{where}: {section} is not a section: {hint}Sections are {', '.join(schema.model_fields)}")
        names = {setting.name: setting.info for setting in settings.values() if setting.section == section}
        if content is None:  # a section whose every line is commented out
            continue
        if not isinstance(content, dict):
            raise UserError(
                f"{where}: section {section} must be a mapping, not {content!r}: indent its settings below it, such as "
                f"{next(iter(names))}: ..."
            )
        for name, value in content.items():
            where = f"{path}:{lines[section, name]}"
            if name not in names:
                near = _owners(name, settings) or [f"{section}.{near}" for near in _near(str(name), list(names))]
                hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(names)}"
                raise UserError(f"{where}: {name} is not a setting of {section}: {hint}")
            shown = str(value).lower() if isinstance(value, bool) else "null" if value is None else value
            origins[section, name] = f"{where}: {section}.{name}: {shown}"
            if isinstance(value, bool) and names[name].annotation is not bool:  # pydantic would read true as 1
                raise UserError(f"{origins[section, name]}: must be {_legal(names[name])}; {_remedy(names[name])}")
            values[section][name] = value


def _merge(new: Mapping[str, Mapping[str, Any]], values: dict[str, dict[str, Any]]) -> None:
    for section, content in new.items():
        values[section] |= content


def _owners(key: Any, settings: Mapping[str, Setting]) -> list[str]:
    """Where a key belongs that was put into the wrong section or spelt as its flag: ``adapter.alpha``."""
    return [f"{setting.section}.{setting.name}" for flag, setting in settings.items() if key in (setting.name, flag)]


# ------------------------------------------------------------------------------------------- what to tell the user


def _explain(error: ValidationError, schema: type[RunConfig], origins: Mapping[tuple[str, str], str]) -> str:
    """The first mistake in one line, and how many more there are."""
    details = error.errors(include_url=False)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return _explain_one(details[0], schema, origins) + more


def _explain_one(detail: ErrorDetails, schema: type[RunConfig], origins: Mapping[tuple[str, str], str]) -> str:
    location = detail["loc"]
    reason = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else None
    if len(location) < 2:  # a rule over several settings, which its message names
        return reason or detail["msg"]
    section, name = str(location[0]), str(location[1])
    origin = origins.get((section, name), f"{section}.{name}: {detail['input']}")
    if reason:
        return f"{origin}: {reason}"
    section_type = schema.model_fields[section].annotation
    assert section_type is not None
    info = section_type.model_fields[name]
    element = f"{detail['input']} is wrong, " if len(location) > 2 else ""
    finite = "finite, " if detail["type"] == "finite_number" else ""
    near = difflib.get_close_matches(str(detail["input"]), _choices(info), n=1)
    remedy = f"did you mean {near[0]}?" if near else _remedy(info)
    return f"{origin}: {element}must be {finite}{_legal(info)}; {remedy}"


def _remedy(info: FieldInfo) -> str:
    default = info.get_default()
    if isinstance(default, bool):
        default = str(default).lower()
    if isinstance(default, tuple):
        default = " ".join(default)
    return f"leave it out for the default, {default}" if default not in (None, "") else "or leave it out"


def _kind(info: FieldInfo) -> Any:
    """The type of a setting without the ``None`` that it may also take."""
    union = get_origin(info.annotation) in (Union, types.UnionType)
    return next(kind for kind in get_args(info.annotation) if kind is not type(None)) if union else info.annotation


def _choices(info: FieldInfo) -> list[str]:
    """The words of a setting (or of each element of a list) that takes one of a few."""
    kind = get_args(info.annotation)[0] if get_origin(info.annotation) is tuple else _kind(info)
    return [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []


def _legal(info: FieldInfo) -> str:
    """The legal values of a setting, in words: ``a number > 0``, ``one of fp32, bf16, fp16``."""
    choices = ", ".join(_choices(info))
    if get_origin(info.annotation) is tuple:
        return f"one or more of {choices}" if choices else "a list of words (in YAML: [a, b])"
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text (in YAML: in quotes)"}
    symbols = {"gt": ">", "ge": ">=", "lt": "<"}  # annotated_types.Gt has an attribute gt, and so on
    bounds = [f"{symbols[n]} {getattr(limit, n)}" for limit in info.metadata for n in symbols if hasattr(limit, n)]
    legal = f"one of {choices}" if choices else words[_kind(info)]
    optional = ", or none" if type(None) in get_args(info.annotation) else ""
    return " ".join([legal, " and ".join(bounds)]).strip() + optional
