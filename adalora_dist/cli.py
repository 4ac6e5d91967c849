"""From a command line and a YAML file to a validated run, and from a user's mistake to one line.

Order of precedence: the schema's defaults, then ``--config file.yaml``, then flags (of a repeated flag the last).
Both sources become one nested mapping that pydantic validates, so a mistake reads the same wherever it was made;
tyro renders ``--help`` from the same schema. Nothing here imports torch: a typing error must not cost half a minute.
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

import annotated_types
import tyro
import yaml
from pydantic import Field, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from adalora_dist.config import RunConfig
from adalora_dist.errors import UserError

ConfigT = TypeVar("ConfigT", bound=RunConfig)

RANK0_HEAD_START_SECONDS = 5.0
"""How long other ranks wait before they report: launchers end them once rank 0 has reported the same mistake."""


class Setting(NamedTuple):
    """One field of one section of the schema."""

    section: str
    name: str
    info: FieldInfo


def parse_config(schema: type[ConfigT], argv: list[str] | None = None, description: str = "") -> ConfigT:
    """The run that the command line asks for.

    Args:
        schema: ``RunConfig`` or a recipe's subclass of it.
        argv: arguments without the program's name; None: ``sys.argv[1:]``.
        description: first paragraph of ``--help``.

    Raises:
        SystemExit: code 0 after ``--help``; code 2 after a mistake, told in one line on standard error.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "--help" in arguments or "-h" in arguments:
        _print_help(schema, description)
    with user_errors():
        return _parse(schema, arguments)
    raise AssertionError("unreachable: user_errors never swallows an exception")


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


def _print_help(schema: type[RunConfig], description: str) -> NoReturn:
    config_flag = (
        Annotated[str, tyro.conf.arg(metavar="FILE.yaml")],
        Field("", description="YAML file with nested sections; flags override what it sets."),
    )
    with_config: Any = create_model(schema.__name__, __base__=schema, config=config_flag)
    tyro.cli(with_config, args=["--help"], description=description, config=(tyro.conf.OmitArgPrefixes,))
    raise AssertionError("unreachable: tyro exits after --help")


def _parse(schema: type[ConfigT], arguments: Sequence[str]) -> ConfigT:
    settings = _settings(schema)
    given = _split(arguments, settings)
    # What a recipe's schema presets in a section must survive when the user sets another field of that section.
    values = {
        name: section.get_default(call_default_factory=True).model_dump(exclude_unset=True)
        for name, section in schema.model_fields.items()
    }
    origins: dict[tuple[str, str], str] = {}
    if "config" in given:
        _merge_yaml(schema, Path(given.pop("config")[0]), values, origins)
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


def _split(arguments: Sequence[str], settings: Mapping[str, Setting]) -> dict[str, list[str]]:
    """Flags as typed, ``{"epochs": ["3"], "tasks": ["boolq", "piqa"], ...}``; ``--no-x`` becomes ``{"x": ["false"]}``."""
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
        if not typed.startswith("--") or flag not in (*settings, "config", "local-rank"):
            positive = flag.removeprefix("no-")
            if not typed.startswith("--no") or positive not in settings or settings[positive].info.annotation != bool:
                raise UserError(f"{typed} is not a flag: {_nearest_flags(flag, settings)}")
            if equals:
                raise UserError(f"{typed} takes no value: write {typed} or --{positive}")
            flag, words = positive, ["false"]
        if flag == "config" and flag in given:
            raise UserError("--config is given twice: give one file, and flags for what differs")
        given[flag] = words
    given.pop("local-rank", None)  # appended by launchers; the rank is read from the environment

    for flag, words in given.items():
        info = settings[flag].info if flag in settings else None
        takes_list = info is not None and get_origin(info.annotation) is tuple
        if info is not None and info.annotation == bool and not words:
            words.append("true")
        if not words or "" in words:
            legal = _legal(info) if info else "the path of a YAML file"
            hint = ", or the word none for an empty list" if takes_list else ""
            raise UserError(f"--{flag} has no value: give it {legal}{hint}")
        if len(words) > 1 and not takes_list:
            raise UserError(f"--{flag} takes one value and got {len(words)}: {' '.join(words)}; keep one of them")
    return given


def _flag_value(info: FieldInfo, words: list[str]) -> Any:
    is_none = words in (["none"], ["None"])
    if get_origin(info.annotation) is tuple:
        return [] if is_none else words
    return None if is_none and type(None) in get_args(info.annotation) else words[0]


def _nearest_flags(flag: str, settings: Mapping[str, Setting]) -> str:
    known = {name: f"--{name}" for name in (*settings, "config")}
    known |= {f"no-{name}": f"--no-{name}" for name, setting in settings.items() if setting.info.annotation == bool}
    near = _near(flag.rpartition(".")[2].lstrip("-"), list(known))
    return f"did you mean {' or '.join(known[name] for name in near)}?" if near else "see --help for all of them"


def _near(word: str, candidates: Sequence[str]) -> list[str]:
    """Up to three candidates, most alike first; ``lr`` finds ``learning-rate`` by its initials."""
    initials = [c for c in candidates if "".join(part[:1] for part in re.split("[-_]", c)) == word]
    return [*dict.fromkeys([*initials, *difflib.get_close_matches(word, candidates, n=3, cutoff=0.6)])][:3]


# -------------------------------------------------------------------------------------------------- the YAML file


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a repeated key, of which YAML libraries silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is set twice; keep one", problem_mark=key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _merge_yaml(
    schema: type[RunConfig], path: Path, values: dict[str, dict[str, Any]], origins: dict[tuple[str, str], str]
) -> None:
    """Put the file's settings into ``values``, and ``file:line: section.key: value`` of each into ``origins``."""
    sections, lines = _read_yaml(path)
    settings = _settings(schema)
    for section, content in sections.items():
        where = f"{path}:{lines[section,]}"
        if section not in schema.model_fields:
            owners = [f"{s.section}.{s.name}" for flag, s in settings.items() if section in (s.name, flag)]
            near = owners or _near(str(section), list(schema.model_fields))
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UserError(f"{where}: {section} is not a section: {hint}Sections are {', '.join(schema.model_fields)}")
        names = {setting.name: setting.info for setting in settings.values() if setting.section == section}
        if content is None:  # a section whose every line is commented out
            continue
        if not isinstance(content, dict):
            raise UserError(
                f"{where}: section {section} must be a mapping, not {content!r}: indent its settings below it, such as "
                f"{next(iter(names))}"
            )
        for name, value in content.items():
            where = f"{path}:{lines[section, name]}"
            if name not in names:
                owners = [f"{s.section}.{s.name}" for s in settings.values() if s.name == name]
                near = owners or [f"{section}.{n}" for n in _near(str(name), list(names))]
                hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(names)}"
                raise UserError(f"{where}: {name} is not a setting of {section}: {hint}")
            shown = str(value).lower() if value is None or isinstance(value, bool) else value
            origins[section, name] = f"{where}: {section}.{name}: {shown}"
            if isinstance(value, bool) and names[name].annotation != bool:  # pydantic would read true as 1
                raise UserError(f"{origins[section, name]}: must be {_legal(names[name])}; {_remedy(names[name])}")
            values[section][name] = value


def _read_yaml(path: Path) -> tuple[dict[Any, Any], dict[tuple[Any, ...], int]]:
    """The file's mapping, and the line (from 1) of each ``(section,)`` and ``(section, key)``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"--config {path}: cannot be read ({reason}): give the path of a YAML file") from None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"--config {path}: must be a mapping of sections, such as 'adapter: {{target_rank: 8}}'")
        content: dict[Any, Any] = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML ({error.problem}): correct that line") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not valid YAML ({error}): correct the file") from None
    lines: dict[tuple[Any, ...], int] = {}
    for section, body in root.value:
        name = loader.construct_object(section)
        lines[name,] = section.start_mark.line + 1
        if isinstance(body, yaml.MappingNode):
            lines |= {(name, loader.construct_object(key)): key.start_mark.line + 1 for key, _ in body.value}
    return content, lines


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
    element = f"{detail['input']!r} is not legal here, " if len(location) > 2 else ""
    near = difflib.get_close_matches(str(detail["input"]), _choices(info), n=1)
    return f"{origin}: {element}must be {_legal(info)}; {f'did you mean {near[0]}?' if near else _remedy(info)}"


def _remedy(info: FieldInfo) -> str:
    default = info.get_default()
    if isinstance(default, bool):
        default = str(default).lower()
    if isinstance(default, tuple):
        default = " ".join(default)
    return f"leave it out for the default, {default}" if default not in (None, "") else "or leave it out"


def _choices(info: FieldInfo) -> list[str]:
    """The words of a setting (or of each element of a list) that takes one of a few."""
    kind = get_args(info.annotation)[0] if get_origin(info.annotation) is tuple else info.annotation
    return [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []


def _legal(info: FieldInfo) -> str:
    """The legal values of a setting, in words: ``a number > 0``, ``one of fp32, bf16, fp16``."""
    choices = ", ".join(_choices(info))
    if get_origin(info.annotation) is tuple:
        return f"a list of {choices or 'words'} (separated by spaces; in YAML [a, b])"
    if choices:
        return f"one of {choices}"
    union = get_origin(info.annotation) in (Union, types.UnionType)
    kinds = get_args(info.annotation) if union else (info.annotation,)
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a text (quoted in YAML)"}
    bounds = []
    for limit in info.metadata:
        for symbol, kind, attribute in (
            (">", annotated_types.Gt, "gt"),
            (">=", annotated_types.Ge, "ge"),
            ("<", annotated_types.Lt, "lt"),
        ):
            if isinstance(limit, kind):
                bounds.append(f"{symbol} {getattr(limit, attribute)}")
    legal = " ".join([words[next(kind for kind in kinds if kind is not type(None))], " and ".join(bounds)]).strip()
    return f"{legal}, or none" if type(None) in kinds else legal
