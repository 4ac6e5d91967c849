"""Which files of an export may leave the machine, and whether the export is whole. Needs no torch and no network.

Uploads go by a list of names that may go, not by a list of what may not: a base folder can hold anything, and merging
carries along what it does not know. Whatever the list lacks is left out and named.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from adalora_dist.artifacts.whole import check_files, is_model_file
from adalora_dist.backbones.files import indexed_files, is_module_pattern
from adalora_dist.config.hub_names import is_repo_id
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import read_bytes, read_object
from adalora_dist.io.progress import progress_bar
from adalora_dist.io.publish import PARTIAL
from adalora_dist.io.redaction import HIDDEN, redacted, secret_in

LEGAL_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
"""The base's terms, which travel with what is derived from it."""

_CONFIGS = dict.fromkeys(("config.json", "adapter_config.json"))
"""One of them is in every export."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class ExportFiles:
    """A whole export: path and SHA-256 by name, and the names in its folder that stay behind."""

    paths: Mapping[str, Path]
    sha256: Mapping[str, bytes]
    left_out: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(path.stat().st_size for path in self.paths.values())


def without_tokens(text: str, token: str | None = None) -> str:
    """``text`` with ``token``, and all else that looks like a secret, replaced by ``***``."""
    shown: str = redacted(text.replace(token, HIDDEN) if token else text)
    return shown


def check_is_export(export: Path) -> None:
    """What of :func:`check_export` takes no time.

    Raises:
        UserError: no folder, or not one of a whole export.
    """
    if not export.is_dir():
        raise UserError(f"{export} is not a folder: give the folder of a run or of an export")
    if export.name.endswith(PARTIAL):
        raise UserError(f"{export} is an export that was interrupted: export again, then push")
    _check_configured(export, {name for name in _CONFIGS if os.path.lexists(export / name)})


def _check_configured(export: Path, names: Set[str]) -> None:
    if not names & _CONFIGS.keys():
        raise UserError(f"{export} holds neither {' nor '.join(_CONFIGS)}: give the folder of an export")


def check_export(export: Path, ranks: Mapping[str, int] | None, token: str | None = None) -> ExportFiles:
    """Read every file of an export once: names, safetensors headers, expected tensors, secrets, SHA-256.

    Args:
        export: a folder that ``save_pretrained``, ``artifacts.export.merge`` or PEFT could have written.
        ranks: active rank by matrix, whose tensors must be there; None: not known.
        token: must not occur in any file.

    Raises:
        UserError: no export, a link that leads out of the folder, a name or an index that points elsewhere, a file
            that is cut off, a tensor that is missing, a token in a file.
    """
    check_is_export(export)
    inside = export.resolve()
    paths, left_out = {}, []
    for path in sorted(export.iterdir()):
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
            raise UserError(f"{str(path)!r} is a link that leads out of the folder: replace it by a copy, or remove it")
        allowed = is_model_file(path.name) or path.name in LEGAL_FILES
        if allowed and not _PLAIN_NAME.fullmatch(path.name):
            raise UserError(f"{str(path)!r}: names must be of letters, digits, '.', '_' and '-' alone; rename the file")
        if allowed and path.is_file():
            paths[path.name] = path
        else:
            left_out.append(path.name)
    if "adapter_config.json" in paths:
        _check_adapter_config(paths["adapter_config.json"])
    _check_configured(export, paths.keys())
    _check_weights(export, paths, ranks)
    sha256 = {}
    for name, path in progress_bar(paths.items(), desc="check", unit="file"):
        refuse_token(path, token)
        sha256[name] = _sha256(path)
    return ExportFiles(paths, sha256, tuple(left_out))


def refuse_token(path: Path, token: str | None) -> None:
    """Weights are numbers; of their files only the header can hold text.

    Raises:
        UserError: ``token``, or what looks like a secret, is in the text; with the file and the kind.
    """
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            text = file.read(int.from_bytes(file.read(8), "little"))
    else:
        text = read_bytes(path)
    decoded = _as_read(text)
    kind = "a token of the Hub" if token and token in decoded else secret_in(decoded)
    if kind:
        raise UserError(f"{path} holds {kind}: revoke it, remove it from the file, and push again")


def _as_read(content: bytes) -> str:
    """What somebody gets who reads it: UTF-16 without the zeros between letters, JSON and HTML without escapes, and
    without what no page shows."""
    text = content.replace(b"\0", b"").decode("utf-8", errors="replace")
    text = re.sub(r"\\u00([2-7][0-9a-fA-F])", lambda found: chr(int(found[1], 16)), text).replace("\\/", "/")
    text = re.sub(r"&#(?:x([0-9a-fA-F]{2})|(\d{2,3}));", lambda f: chr(int(f[1], 16) if f[1] else int(f[2])), text)
    return re.sub("[\u00ad\u200b-\u200d\u2060\ufeff]", "", text)


def _check_adapter_config(path: Path) -> None:
    """PEFT opens the base by the name that it finds here, and matches module names with the keys of the patterns."""
    config = read_object(path)
    base = config.get("base_model_name_or_path")
    is_folder = isinstance(base, str) and base.startswith("/") and base.isprintable() and Path(base).is_dir()
    if not is_folder and not (isinstance(base, str) and is_repo_id(base)):
        raise UserError(
            f"{path}: base_model_name_or_path {base!r:.100} must be a model on the Hub, or the full path of a folder "
            "that is there: export again, or correct it"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field) or {}
        keys = list(pattern) if isinstance(pattern, dict) else [pattern]
        wrong = next((key for key in keys if not is_module_pattern(key)), None)
        if wrong is not None:
            raise UserError(f"{path}: {field} has the key {wrong!r:.100}: must be the name of a module; export again")


def _check_weights(export: Path, paths: Mapping[str, Path], ranks: Mapping[str, int] | None) -> None:
    stored = check_files(path for name, path in paths.items() if is_model_file(name))
    for name in (name for name in paths if name.endswith(".safetensors.index.json")):
        _check_index(paths[name], stored)
    keys = set().union(*stored.values())
    if not keys:
        raise UserError(f"{export} holds no weights (*.safetensors): export again")
    is_adapter = "adapter_config.json" in paths
    is_vera = is_adapter and read_object(paths["adapter_config.json"]).get("peft_type") == "VERA"
    factors = ("vera_lambda_b", "vera_lambda_d") if is_vera else ("lora_A", "lora_B")
    for matrix, rank in (ranks or {}).items():
        if not is_adapter:
            wanted = [f"{matrix}.weight"]
            found = {f"{matrix}.weight", f"{matrix.partition('.')[2]}.weight"} & keys
        else:
            wanted = [f"{matrix}.{factor}" for factor in factors] if rank else []
            found = {w for w in wanted if any(f".{w}" in f".{key}" for key in keys)}
        if len(found) < len(wanted):
            missing = next(w for w in wanted if w not in found)
            raise UserError(f"{export}: its weights lack {missing}, a matrix that the run adapted: export again")


def _check_index(index: Path, stored: Mapping[str, Set[str]]) -> None:
    files = indexed_files(index)
    if not files:
        raise UserError(f"{index}: names no file: export again")
    for tensor, file in files.items():
        if tensor not in stored.get(file.name, ()):
            raise UserError(f"{index}: {tensor!r} is said to be in {file.name}, and is not: export again")


def _sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.digest()
