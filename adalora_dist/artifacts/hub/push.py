"""Push an export to the Hugging Face Hub: all of it in one commit, or nothing.

A reader of the repository sees what was there before or the whole export, never a part: files are checked on disk
first, large ones travel to the Hub's storage, where nobody sees them, and one commit then names them all, together
with the removal of what an earlier push left. A push that was interrupted is simply made again: what has arrived in
the storage is not sent again, and a commit that has happened already is not made twice.

No function here is collective. A distributed run calls :func:`push` on its main process, after the process group is
gone, so that no other process can wait for the network.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, parse_ratelimit_headers

from adalora_dist.artifacts.hub.card import card_pictures, model_card
from adalora_dist.artifacts.hub.files import ExportFiles, check_export, check_is_export, refuse_token, without_tokens
from adalora_dist.artifacts.whole import is_model_file
from adalora_dist.config.formats import ExportFormat
from adalora_dist.config.hub_names import check_branch, check_repo_id
from adalora_dist.config.sections import RunConfig
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import read_bytes, read_object

T = TypeVar("T")

_WAITS_SECONDS = (1, 2, 4, 8, 16, 32, 60)
"""Between attempts, unless the server asks for longer."""
_TIMEOUT_SECONDS = 300.0
"""Without a byte from the server; the client itself would wait for ever."""
_PASSING = (408, 409, 412, 425, 429, 500, 502, 503, 504)
"""409 and 412: somebody else's commit came in between; the next attempt starts from it."""


def push(
    folder: str | Path,
    repo_id: str,
    to: ExportFormat = "merged",
    public: bool = False,
    revision: str = "main",
    base_license: str = "",
    say: Callable[[str], None] = print,
) -> str:
    """Upload an export with its model card; returns the address of the commit.

    Args:
        folder: a run, whose export FOLDER/TO is pushed, or the folder of an export itself.
        repo_id: NAMESPACE/NAME; created, private unless ``public``, when it does not exist.
        revision: branch, created from main when it does not exist.
        base_license: of the base model, for the card; default: what the run's settings say.
        say: gets what is left out, and what is waited for.

    Raises:
        UserError: a name, folder or file that cannot be pushed, no token, no permission, or a Hub that stays away.
    """

    def tell(line: str) -> None:
        say(without_tokens(line, get_token()))

    check_repo_id(repo_id)
    check_branch(revision)
    run, export = _run_and_export(Path(folder), to)
    check_is_export(export)
    check_login()
    ranks = read_object(run / "rank_pattern.json") if run and (run / "rank_pattern.json").is_file() else None
    files = check_export(export, ranks, get_token())
    written = _written_here(run, export, repo_id, revision, base_license, tell)
    left_out = [name for name in files.left_out if name not in written]
    if left_out:
        tell(f"Left out of the push: {', '.join(map(repr, left_out))}")
    if "adapter_config.json" in files.paths:
        base = read_object(files.paths["adapter_config.json"])["base_model_name_or_path"]
        if Path(base).is_dir():
            tell(f"warning: the adapter names its base by a folder of this machine, {base}: others must give their own")
    api = HfApi(library_name="adalora-dist")
    tell(f"Pushing {len(files.paths)} files, {files.num_bytes / 1e6:,.1f} MB, and the card to {api.endpoint}/{repo_id}")
    persist = _Persistence(repo_id, tell)
    persist(lambda: _open_repository(api, repo_id, public, revision))
    return persist(lambda: _commit(api, repo_id, revision, files, written))


def check_login() -> None:
    """Refuse early what could only fail late: no token, or a machine that was told to stay offline.

    Raises:
        UserError: one of these.
    """
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed to the Hub: unset it, or do not push")
    if get_token() is None:
        raise UserError("no token for the Hub on this machine: run hf auth login, or set HF_TOKEN, or do not push")


def check_push_of_run(config: RunConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Before any work, refuse a run whose push could not happen. For recipes; every rank may call it.

    Raises:
        UserError: as :func:`check_login`, on rank 0, which is the one that pushes; several seeds.
    """
    if not config.export.push_to_hub:
        return
    seeds = getattr(config.train, "seeds", ())
    if seeds:
        raise UserError(
            f"push_to_hub {config.export.push_to_hub} with seeds {' '.join(map(str, seeds))}: one run is pushed, not "
            f"{len(seeds)}; leave push_to_hub out and choose one afterwards: adalora-dist push"
        )
    if environment.get("RANK", "0") == "0":
        check_login()


def push_run(config: RunConfig) -> None:
    """Push what a recipe has left in its run folder, if ``push_to_hub`` asks for it; print the address.

    For the main process alone, when the process group is gone.

    Raises:
        UserError: as :func:`push`.
    """
    export = config.export
    if export.push_to_hub:
        folder = Path(config.train.output_dir)
        address = push(folder, export.push_to_hub, "merged", export.push_public, export.push_revision)
        print(f"Pushed: {address}")


def _run_and_export(folder: Path, to: str) -> tuple[Path | None, Path]:
    """The run, if there is one, and the folder of its export."""
    if (folder / "run.json").is_file():
        if not (folder / to).is_dir():
            raise UserError(f"{folder} holds no {to} export: run adalora-dist export {folder} --to {to} first")
        return folder, folder / to
    has_run = (folder.parent / "run.json").is_file()
    return (folder.parent if has_run else None), folder


def _written_here(
    run: Path | None, export: Path, repo_id: str, revision: str, base_license: str, say: Callable[[str], None]
) -> dict[str, bytes]:
    """The card and its pictures, by name; for an export without its run, the README.md that lies in it."""
    if run is None:
        readme = export / "README.md"
        if not readme.is_file() or readme.is_symlink():
            raise UserError(
                f"{export} has no run beside it to make a model card from, and no README.md: push the run's folder, or "
                "write a README.md"
            )
        refuse_token(readme, get_token())
        return {"README.md": read_bytes(readme)}
    try:
        pictures = card_pictures(run)
    except UserError as error:
        say(f"warning: the card goes without pictures: {error}")
        pictures = {}
    card = model_card(run, export, repo_id, revision, base_license, pictures)
    return {"README.md": without_tokens(card, get_token()).encode(), **pictures}


# ------------------------------------------------------------------------------------------- what talks to the Hub


def _open_repository(api: HfApi, repo_id: str, public: bool, revision: str) -> None:
    get_session().timeout = _TIMEOUT_SECONDS
    api.create_repo(repo_id, private=not public, exist_ok=True)
    is_private = bool(api.model_info(repo_id).private)
    if public and is_private:
        raise UserError(f"{repo_id} exists and is private: leave out --public, or make it public in its settings")
    if not public and not is_private:
        raise UserError(f"{repo_id} exists and is public: pass --public to publish in it, or choose another name")
    if revision != constants.DEFAULT_REVISION:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _commit(api: HfApi, repo_id: str, revision: str, files: ExportFiles, written: Mapping[str, bytes]) -> str:
    """One attempt, planned from the branch as it is now. Whatever already is as it should be makes no operation."""
    get_session().timeout = _TIMEOUT_SECONDS
    head = api.model_info(repo_id, revision=revision)
    there = {sibling.rfilename for sibling in head.siblings or ()}
    additions = [CommitOperationAdd(name, content) for name, content in written.items()]
    for name, path in files.paths.items():
        additions.append(CommitOperationAdd(name, path))
        additions[-1].upload_info.sha256 = files.sha256[name]  # it would read the file once more
    # A model.safetensors of an earlier push would be loaded in place of this one's shards.
    stale = sorted(name for name in there if is_model_file(name) and name not in files.paths)
    _avoid_xet_where_it_is_not(api, repo_id, revision)
    # upload_folder would do the same in several commits.
    commit = api.create_commit(
        repo_id,
        [*additions, *(CommitOperationDelete(name) for name in stale)],
        commit_message="Push an export of adalora-dist",
        revision=revision,
        parent_commit=head.sha,
    )
    return commit.commit_url


def _avoid_xet_where_it_is_not(api: HfApi, repo_id: str, revision: str) -> None:
    """The client uploads through Xet wherever it is installed; a server without it has LFS alone, and is not asked."""
    if constants.HF_HUB_DISABLE_XET:
        return
    address = f"{api.endpoint}/api/models/{repo_id}/xet-write-token/{revision.replace('/', '%2F')}"
    response = get_session().get(address, headers=build_hf_headers())
    if response.status_code == 404:
        constants.HF_HUB_DISABLE_XET = True
    else:
        hf_raise_for_status(response)


class _Persistence:
    """Call something until it works, waiting longer each time, as long as what fails can pass by itself."""

    def __init__(self, repo_id: str, say: Callable[[str], None]) -> None:
        self.repo_id, self.say = repo_id, say

    def __call__(self, action: Callable[[], T]) -> T:
        for attempt, wait in enumerate((*_WAITS_SECONDS, None), start=1):
            try:
                return action()
            except UserError:
                raise
            except (HTTPError, OSError, RuntimeError, ValueError) as error:
                reason = without_tokens(_one_line(error), get_token())
                origin = _origin(error)
                if not _can_pass(origin):
                    raise UserError(self._refused(origin, reason)) from None
                if wait is None:
                    raise UserError(
                        f"{self.repo_id}: the Hub failed {attempt} times ({reason}): push again later, what has "
                        "arrived is not sent again"
                    ) from None
                seconds = max(wait, _asked_to_wait(origin))
            self.say(f"The Hub: {reason}; next attempt in {seconds:.0f} s")
            time.sleep(seconds)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _refused(self, error: BaseException, reason: str) -> str:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        remedy = {
            401: "the token is not accepted: run hf auth login, or correct HF_TOKEN",
            403: f"the token may not write to {self.repo_id}: use one that may, or choose another namespace",
        }.get(status or 0, "nothing was published")
        return f"{self.repo_id} cannot be pushed to ({reason}): {remedy}"


def _origin(error: BaseException) -> BaseException:
    """What an upload in a thread failed of: the client wraps it in a RuntimeError."""
    while not isinstance(error, HTTPError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _can_pass(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _PASSING
    # A page that is no JSON is a gateway's, not the Hub's.
    return isinstance(error, HTTPError | ConnectionError | TimeoutError | json.JSONDecodeError)


def _asked_to_wait(error: BaseException) -> float:
    """Seconds of the server's Retry-After (a number or a date) or rate limit; 0 without."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    headers = error.response.headers
    value = headers.get("Retry-After", "").strip()
    limit = parse_ratelimit_headers(headers)
    if value.isdigit():
        return float(value)
    if value:
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return 0.0
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else 0.0


def _one_line(error: BaseException) -> str:
    text = " ".join(str(_origin(error)).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
