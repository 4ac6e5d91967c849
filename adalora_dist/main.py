"""The command ``adalora-dist``: what can be done with a run once it is there.

    adalora-dist inspect RUN                           ranks, history, sizes
    adalora-dist export RUN --to merged|lora|peft      a model for transformers, or an adapter for PEFT and vLLM

RUN is the folder of a finished run, or a checkpoint in one. Each subcommand imports what it needs when it is called,
so that ``--help`` and mistakes cost no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from adalora_dist.cli import fail, user_errors


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(f"{self.prog}: {message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand. Mistakes end with code 2 and one line on standard error."""
    parser = _Parser(
        "adalora-dist", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_export(commands)
    _add_inspect(commands)
    arguments = parser.parse_args(argv)
    with user_errors():
        arguments.run_command(arguments)


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("export", help="write a run in a form that others load", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run, or a checkpoint in one")
    parser.add_argument(
        "--to",
        required=True,
        choices=("merged", "lora", "peft"),
        help="merged: a whole model; lora: plain LoRA for PEFT and vLLM; peft: AdaLoRA for PEFT",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="must not exist; default: RUN/FORMAT")
    parser.set_defaults(run_command=_export)


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("inspect", help="ranks, history and sizes of a run", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.set_defaults(run_command=_inspect)


def _export(arguments: argparse.Namespace) -> None:
    raise NotImplementedError


def _inspect(arguments: argparse.Namespace) -> None:
    raise NotImplementedError


if __name__ == "__main__":
    main()
