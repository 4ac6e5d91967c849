"""From a command line and a YAML file to a validated run, and from a user's mistake to one line.

Order of precedence: the schema's defaults, then a row of the recipe's table of presets (``presets.py``), then
``--config file.yaml``, then flags (of a repeated flag the last). All become one nested mapping that pydantic validates,
so a mistake reads the same wherever it was made; tyro renders ``--help`` from the same schema. Nothing here imports
torch: a typing error must not cost half a minute.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from adalora_dist.config.foreign_names import flag_here
from adalora_dist.config.help import HELP_FLAGS, print_help
from adalora_dist.config.methods import METHODS, SizedConfig, is_method, settings_of
from adalora_dist.config.methods.base import FOREIGN, methods_with
from adalora_dist.config.presets import PresetTable
from adalora_dist.config.run_file import Origins, RunFile
from adalora_dist.config.sections import RunConfig
from adalora_dist.config.settings import Setting, settings_by_flag
from adalora_dist.config.words import is_union, legal, must_be, near
from adalora_dist.io.ending import EXIT_PREEMPTED, leave, repeat_last, tell_error
from adalora_dist.io.errors import UserError
from adalora_dist.io.launchers import OWN_OPTIONS, follow, unfollow
from adalora_dist.io.publish import refusal_of_disk
from adalora_dist.io.shipped import config_file
from adalora_dist.io.signals import SignalListener
from adalora_dist.io.terminal import keep_writing, let_go_of_terminal

ConfigT = TypeVar("ConfigT", bound=RunConfig)

RANK0_HEAD_START_SECONDS = 5.0
"""How long other ranks wait before they report: launchers end them once rank 0 has reported the same mistake."""


def parse_config(
    schema: type[ConfigT], argv: list[str] | None = None, description: str = "", table: Path | None = None
) -> ConfigT:
    """The run that the command line asks for.

    Args:
        schema: ``RunConfig`` or a recipe's subclass of it.
        argv: arguments without the program's name; None: ``sys.argv[1:]``.
        description: its first paragraph is that of ``--help``.
        table: YAML file of the recipe's presets; gives it the flags ``--preset`` and what else picks a row.

    Raises:
        SystemExit: code 0 after ``--help``; code 2 after a mistake, told in one line on standard error.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if any(flag in arguments for flag in HELP_FLAGS):
        print_help(schema, arguments, description, table)
    try:
        return _parse(schema, arguments, table)
    except UserError as error:
        fail(error)


def fail(error: object) -> NoReturn:
    """Print ``error: <one line>`` on standard error and exit with code 2.

    Of several ranks (``RANK``, or else ``LOCAL_RANK``, in the environment) rank 0 speaks first, and launchers then end
    the others. A rank that is still alive after ``RANK0_HEAD_START_SECONDS`` failed alone, and says so.
    """
    rank = _rank()
    if rank != "0":
        time.sleep(RANK0_HEAD_START_SECONDS)
    tell_error(error if rank == "0" else f"rank {rank}: {error}")
    raise SystemExit(2)


@contextlib.contextmanager
def user_errors(resumable: bool = True) -> Iterator[None]:
    """Around a whole program: it ends with one line, whatever it was given. A context manager and a decorator.

    A ``UserError`` turns into :func:`fail`, and so does a disk that is full or fails under any library, a name that no
    file can have, and what this user may not open; every other exception propagates. A signal, Ctrl-C and a closed
    terminal among them, ends the program at once, as does the end of its launcher, until the run's ``Guard`` takes
    over. What the terminal cannot show is escaped.

    Args:
        resumable: a run, whose exit code after a signal is ``EXIT_PREEMPTED``; else 128 + the signal's number.
    """

    def end(number: int) -> None:
        if number == signal.SIGHUP:
            let_go_of_terminal()
        if _rank() == "0":
            line = f"ended by a signal ({signal.Signals(number).name})"
            print(f"\n{line}", file=sys.stderr, flush=True)
            repeat_last(line)
        leave(EXIT_PREEMPTED if resumable else 128 + number)

    def end_orphaned() -> None:
        end(signal.SIGTERM)

    def end_of_thread(ended: threading.ExceptHookArgs) -> None:
        if ended.exc_value is None or (refusal := refusal_of_disk(ended.exc_value)) is None:
            show_end_of_thread(ended)
        else:
            name = "a thread" if ended.thread is None else ended.thread.name
            print(f"warning: {name} has ended: {refusal}", file=sys.stderr, flush=True)

    keep_writing()
    signals = SignalListener(lambda number, again: end(number))
    follow(end_orphaned)
    show_end_of_thread, threading.excepthook = threading.excepthook, end_of_thread
    try:
        yield
    except UserError as error:
        fail(error)
    except (OSError, RuntimeError, ValueError) as error:
        if (refusal := refusal_of_disk(error)) is None:
            raise
        fail(refusal)
    finally:
        threading.excepthook = show_end_of_thread
        unfollow(end_orphaned)
        signals.close()


def _rank() -> str:
    return os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or "0"


def _parse(schema: type[ConfigT], arguments: Sequence[str], path: Path | None) -> ConfigT:
    all_settings = settings_by_flag(schema)
    table = PresetTable(path, tuple(schema.model_fields)) if path else None
    picks = table.axes_besides(all_settings) if table else []
    given = _split(arguments, all_settings, picks)
    file = RunFile(config_file(given.pop("config")[0]) if "config" in given else None, schema)
    picked = {axis: given.pop(axis)[0] for axis in picks if axis in given}
    defaults = {name: info.get_default(call_default_factory=True) for name, info in schema.model_fields.items()}
    # What a recipe's schema presets in a section must survive when the user sets another field of that section.
    values: dict[str, dict[str, Any]] = {n: section.model_dump(exclude_unset=True) for n, section in defaults.items()}
    if table is not None and picked:
        for axis in (a for a in table.axes if a not in picks):  # a setting that picks rows, too
            section, name, _ = all_settings[axis]
            own = file.value(section, name, getattr(defaults[section], name, None))
            word = given[axis][0] if axis in given else own
            picked |= {axis: str(word)} if word is not None else {}
        for section, content in table.resolve(picked).items():
            values[section] |= content

    method = file.value("adapter", "method", values["adapter"].get("method", defaults["adapter"].method))
    method = given["method"][0] if "method" in given else method
    settings = settings_by_flag(schema, method if is_method(method) else None)
    if is_method(method):  # where not, that is the mistake to tell of, and pydantic does
        # What recipe and table set, nobody asked for: it is common to methods, of which one takes what it has.
        values["adapter"] = settings_of(method, values["adapter"])
    origins = file.merge_into(values, method)
    values["adapter"]["method"] = method
    for flag, words in given.items():
        section, name, info = all_settings[flag]
        values[section][name] = _flag_value(info, words)
        origins[section, name] = f"--{flag} {' '.join(words)}"
    if "budget" in picked:  # a table's word for one of its rows, which says the ranks
        values["adapter"].pop("budget", None)
    values["adapter"] = _sized_once(values["adapter"], origins)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        infos = {(section, name): info for section, name, info in settings.values()}
        raise UserError(_explain(error, infos, origins)) from None


def _sized_once(adapter: dict[str, Any], origins: Origins) -> dict[str, Any]:
    """A budget over ranks that a file, a preset or the recipe gives, as a flag is over a file.

    Both in one place, or ranks after a budget, stay and are refused.
    """
    budget = origins.get(("adapter", "budget"))
    if budget is None or adapter.get("budget") is None or not is_method(adapter["method"]):
        return adapter
    config = METHODS[adapter["method"]]
    if not issubclass(config, SizedConfig):  # which has no budget, and says so
        return adapter
    given = {name: origin for (section, name), origin in origins.items() if section == "adapter"}
    return config.give_way(adapter, {n for n, origin in given.items() if n != "budget" and _is_as_late(origin, budget)})


def _is_as_late(origin: str, other: str) -> bool:
    return origin.startswith("--") or not other.startswith("--")


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
            of_command = os.environ.get(OWN_OPTIONS, "").split()
            alike = near(flag.rpartition(".")[2].lstrip("-"), [*settings, *switches, *picks, "config", *of_command])
            hint = f"did you mean --{' or --'.join(alike)}?" if alike else "see --help for all of them"
            if here := flag_here(flag, [*settings, *of_command]):
                hint = f"here: {here}"
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
        others = {"config": "the path of a YAML file", "local-rank": "an integer"}
        value = legal(info) if info else others.get(flag, "a row of the recipe's table")
        hint = ", or the word none for an empty list" if takes_list else ""
        raise UserError(f"--{flag} has no value: give it {value}{hint}")
    if len(words) > 1 and not takes_list:
        raise UserError(f"--{flag} takes one value and got {len(words)}: {' '.join(words)}; keep one of them")


def _flag_value(info: FieldInfo, words: list[str]) -> Any:
    is_none = words in (["none"], ["None"])
    if get_origin(info.annotation) is tuple:
        return [] if is_none else words
    return None if is_none and type(None) in get_args(info.annotation) else words[0]


# ------------------------------------------------------------------------------------------- what to tell the user


def _explain(error: ValidationError, infos: Mapping[tuple[str, str], FieldInfo], origins: Origins) -> str:
    """The first mistake in one line, and how many more there are."""
    details = error.errors(include_url=False)
    of_unions = {place for place, info in infos.items() if is_union(info)}  # of which each type says why not
    places = {d["loc"][:2] if d["loc"][:2] in of_unions else (number, d["loc"]) for number, d in enumerate(details)}
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    return _explain_one(details[0], infos, origins) + more


def _explain_one(detail: ErrorDetails, infos: Mapping[tuple[str, str], FieldInfo], origins: Origins) -> str:
    location = detail["loc"]
    reason = str(detail["ctx"]["error"]) if detail["type"] == "value_error" else None
    if len(location) < 2:  # a rule over several settings, which its message names
        return reason or detail["msg"]
    section, name = str(location[0]), str(location[1])
    origin = origins.get((section, name), f"{section}.{name}: {detail['input']}")
    if detail["type"] == FOREIGN:
        owner = methods_with(name)[0]
        is_of_file = (section, name) in origins and not origin.startswith("--")
        under = f" (or put it under {section}.{owner}, which {owner} alone reads)" if is_of_file else ""
        return f"{origin}: {detail['msg']}{under}"
    if reason:
        return f"{origin}: {reason}"
    if detail["type"] == "extra_forbidden":  # of a table: flags and files have been looked through
        return f"{origin}: no method has such a setting; correct the table of presets"
    info = infos[section, name]
    element = f"{detail['input']} is wrong, " if len(location) > 2 and not is_union(info) else ""
    return f"{origin}: {element}{must_be(info, detail)}"
