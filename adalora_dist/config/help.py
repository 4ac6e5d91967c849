"""What ``--help`` shows: one screen by topic, data first. ``--help-all`` shows all that is said of every flag."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, get_origin

import tyro
from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from adalora_dist.config.methods import METHODS, is_method, settings_of
from adalora_dist.config.presets import PresetTable
from adalora_dist.config.run_file import RunFile
from adalora_dist.config.sections import RunConfig
from adalora_dist.config.settings import Setting, method_setting, settings_by_flag
from adalora_dist.config.words import choices_of, kind_of
from adalora_dist.io.errors import UserError
from adalora_dist.io.shipped import config_file
from adalora_dist.io.terminal import page

HELP_FLAGS = ("-h", "--help", "--help-all")


class Topic(NamedTuple):
    """A part of the screen."""

    sections: tuple[str, ...]
    first: tuple[str, ...]
    """Flags that have a line of their own, where a recipe has them; the others are named."""


TOPICS = {
    "Data": Topic(("data",), ("data", "task", "tasks", "max-length", "max-source-length")),
    "Model": Topic(("model", "quantization"), ("model", "quantization")),
    "Method": Topic(("adapter",), ("method", "init-rank", "target-rank", "targets")),
    "Training": Topic(
        ("train",), ("epochs", "batch-size", "learning-rate", "precision", "output-dir", "resume", "dry-run")
    ),
    "Evaluation": Topic(("evaluation",), ()),
    "Results": Topic(("export",), ("export-formats", "push-to-hub")),
}
_MIN_COLUMNS, _MAX_COLUMNS = 80, 110


def print_help(schema: type[RunConfig], arguments: Sequence[str], description: str, path: Path | None) -> NoReturn:
    """Show what ``arguments`` ask for, of the method that they choose, and exit with code 0.

    Args:
        schema: ``RunConfig`` or a recipe's subclass of it.
        description: docstring of the recipe.
        path: its table of presets, if it has one.
    """
    table = PresetTable(path, tuple(schema.model_fields)) if path else None
    adapter = _adapter_for_help(schema, arguments)
    if "--help-all" in arguments:
        _print_all(schema, adapter, description, table)
    page(_screen(schema, adapter.method, description, table))
    raise SystemExit(0)


def _screen(schema: type[RunConfig], method: str, description: str, table: PresetTable | None) -> str:
    width = max(_MIN_COLUMNS, min(_MAX_COLUMNS, shutil.get_terminal_size().columns))
    settings = settings_by_flag(schema, method)
    lines = [f"usage: {Path(sys.argv[0]).name} [FLAGS]", *textwrap.wrap(_first_paragraph(description), width)]
    start = {"config FILE.yaml": "settings in nested sections, your own or one that adalora-dist ls shows"}
    for axis in table.axes_besides(settings) if table else ():
        start[axis] = f"a row of {table.path.name}: {', '.join(table.words(axis))}" if table else ""
    lines += ["Start (without flags: a demonstration)"]
    for flag, said in start.items():
        lines += _entry(flag, said, width)
    for title, topic in TOPICS.items():
        own = {flag: setting for flag, setting in settings.items() if setting.section in topic.sections}
        named = f" ({method}; --method NAME --help: those of another)" if title == "Method" else ""
        lines.append(title + named)
        for flag in (flag for flag in topic.first if flag in own):
            lines += _entry(f"{flag} {_value(own[flag].info)}".strip(), _summary(flag, own[flag]), width)
        others = " ".join(f"--{flag}" for flag in own if flag not in topic.first)
        lines += textwrap.wrap(others, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    lines += ["--help-all says what each flag does, with its default. --help shows this screen."]
    return "\n".join(lines)


def _entry(flag: str, said: str, width: int) -> list[str]:
    column = 26
    head = f"  --{flag}"
    if len(head) < column - 1:
        return [_cut(f"{head:{column}}{said}", width)]
    line = _cut(f"{head}  {said}", width)
    return [line] if line.startswith(head) else [head]


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 4].rsplit(" ", 1)[0] + " ..."


def _value(info: FieldInfo) -> str:
    """What a flag takes, in capitals, or its words."""
    if choices := choices_of(info):
        return f"{{{','.join(choices)}}}"
    is_list = get_origin(info.annotation) is tuple
    words = {bool: "", int: "INT", float: "NUMBER", str: "TEXT"}
    return "WORD ..." if is_list else words.get(kind_of(info), "VALUE")


def _summary(flag: str, setting: Setting) -> str:
    """The first sentence of what is said of a setting, and its default."""
    said = "what is trained" if flag == "method" else " ".join((setting.info.description or "").split())
    first = re.split(r"[.;] (?![^(]*\))", said, maxsplit=1)[0].rstrip(".")  # not within brackets
    default = setting.info.get_default()
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{first} [{shown}]" if shown not in (None, "", False) else first


def _first_paragraph(text: str) -> str:
    return " ".join(text.strip().partition("\n\n")[0].split())


# ------------------------------------------------------------------------------------------------------- every flag


def _print_all(schema: type[RunConfig], adapter: Any, description: str, table: PresetTable | None) -> NoReturn:
    config_flag: Any = (
        Annotated[str, tyro.conf.arg(metavar="FILE.yaml")],
        Field("", description="YAML file with nested sections; flags override what it sets."),
    )
    picks: Any = {}
    if table is not None:
        for axis in table.axes_besides(settings_by_flag(schema)):
            words = ", ".join(table.words(axis))
            picks[axis] = (str, Field("", description=f"Picks a row of {table.path.name}: {words}."))
    with_config: Any = create_model(
        schema.__name__, __base__=schema, config=config_flag, adapter=(type(adapter), adapter), **picks
    )
    try:
        tyro.cli(with_config, args=["--help"], description=description, config=(tyro.conf.OmitArgPrefixes,))
    except BrokenPipeError:
        page("")
        raise SystemExit(0) from None
    raise AssertionError("unreachable: tyro exits after --help")


def _adapter_for_help(schema: type[RunConfig], arguments: Sequence[str]) -> Any:
    """The section of the method that the flags or a file choose, or else of the recipe's own; its method may be any."""
    words: Mapping[str, str] = dict(re.findall(r"--(method|config)[ =](\S+)", " ".join(arguments)))
    recipes = schema.model_fields["adapter"].get_default(call_default_factory=True)
    method: Any = words.get("method")
    if method is None and "config" in words:
        with contextlib.suppress(UserError):
            file = RunFile(config_file(words["config"]), schema)
            method = file.value("adapter", "method", None)
    method = method if is_method(method) else recipes.method
    setting, config = method_setting(method), METHODS[method]
    any_method: Any = {"method": (setting.annotation, setting)}
    section: Any = create_model(config.__name__, __base__=config, __doc__=config.__doc__, **any_method)
    return section(**{**settings_of(method, recipes.model_dump(exclude_unset=True)), "method": method})
