"""The subcommand ``adalora-dist report``. Importing this file costs no torch, and neither does the command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

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


def _report(arguments: argparse.Namespace) -> None:
    from adalora_dist.artifacts.report.page import write_report

    path = write_report(arguments.runs, arguments.out)
    say(f"Wrote {path} ({path.stat().st_size / 1e3:,.0f} kB): open it in any browser, it needs no network")
