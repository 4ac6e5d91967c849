"""The subcommands ``adalora-dist report`` and ``watch``. Importing this file costs no torch, nor do the commands."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adalora_dist.io.errors import UserError
from adalora_dist.io.terminal import say


def add_report(commands: argparse._SubParsersAction[Any]) -> None:
    """Declare it among the others."""
    parser = commands.add_parser(
        "report", help="one HTML file about one run or several: curves, ranks, scores", allow_abbrev=False
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, finished or not; several: side by side"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: RUN/report.html; of several runs report.html right here"
    )
    parser.set_defaults(run_command=_report)


def add_watch(commands: argparse._SubParsersAction[Any]) -> None:
    """Declare it among the others."""
    parser = commands.add_parser(
        "watch", help="a run in the terminal, while it goes on: loss, budget, ranks", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, finished or not")
    parser.add_argument("--once", action="store_true", help="show it once, whole")
    parser.add_argument("--every", type=_seconds, default=5.0, metavar="SECONDS", help="between looks; default: 5")
    parser.set_defaults(run_command=_watch)


def _seconds(word: str) -> float:
    try:
        seconds = float(word)
    except ValueError:
        seconds = 0.0
    if not 0.2 <= seconds <= 86_400:
        raise argparse.ArgumentTypeError(f"{word} must be a number of seconds from 0.2 to 86,400")
    return seconds


@contextmanager
def _readable() -> Iterator[None]:
    """A folder that may not be looked into, or whose name no file system takes, is a mistake like any other."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): give the output_dir of a run") from error


def _watch(arguments: argparse.Namespace) -> None:
    from adalora_dist.artifacts.report.watch import watch

    with _readable():
        watch(arguments.run, arguments.every, arguments.once)


def _report(arguments: argparse.Namespace) -> None:
    from adalora_dist.artifacts.report.page import write_report

    with _readable():
        path = write_report(arguments.runs, arguments.out)
    say(f"Wrote {path} ({path.stat().st_size / 1e3:,.0f} kB): open it in any browser, it needs no network")
