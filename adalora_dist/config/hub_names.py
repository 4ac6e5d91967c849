"""Names that the Hub takes."""

from __future__ import annotations

import re

from adalora_dist.io.errors import UserError


def is_repo_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name: NAMESPACE/NAME, or NAME alone as a few old models have."""
    part = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
    is_well_formed = re.fullmatch(f"(?:{part}/)?{part}", name) and len(name.rpartition("/")[2]) <= 96
    return bool(is_well_formed) and "--" not in name and ".." not in name and not name.endswith(".git")


def check_repo_id(repo_id: str) -> str:
    """``repo_id`` itself, if something can be pushed there.

    Raises:
        UserError: it is not NAMESPACE/NAME.
    """
    if not (is_repo_id(repo_id) and "/" in repo_id):
        raise UserError(
            f"{repo_id!r} is not a repository of the Hub: must be NAMESPACE/NAME, each of letters, digits, '-', '_' "
            "and '.', neither beginning nor ending with '-' or '.'; give your user name and a name for the model"
        )
    return repo_id


def check_branch(name: str) -> str:
    """``name`` itself, if a branch of a repository on the Hub can be called so.

    Raises:
        UserError: it cannot.
    """
    part = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
    if not re.fullmatch(f"{part}(?:/{part})*", name) or ".." in name or name.endswith((".lock", ".")) or len(name) > 96:
        raise UserError(
            f"revision {name!r} is not a branch: must be of letters, digits, '-', '_', '.' and '/', such as main or v1"
        )
    return name
