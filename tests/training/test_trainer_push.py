"""What ``push_to_hub`` of a Trainer and of its model uploads, to a local server: the adapter, at every moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.local_hub import REPO, LocalHub
from tests.support.paths import ROOT

OTHER = "somebody/by-the-model"
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
WHOLE_MODEL = {"config.json", "model.safetensors", "pytorch_model.bin"}


def test_the_hub_gets_adapters(tmp_path: Path) -> None:
    hub = LocalHub(tmp_path / "hub")
    try:
        command = [sys.executable, str(ROOT / "tests" / "support" / "trainer_push.py"), str(tmp_path), REPO, OTHER]
        process = subprocess.Popen(
            command,
            env=hub.environment(HF_HUB_DISABLE_XET="1"),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        out, errors = hub.outputs(process)
        assert process.returncode == 0, out + errors
        names, others = hub.names(), hub.files(repo=OTHER)
        assert names >= ADAPTER and "last-checkpoint/adapter_config.json" in names
        assert any(name.startswith("last-checkpoint/adalora/") for name in names)
        assert not {Path(name).name for name in names} & WHOLE_MODEL and not others.keys() & WHOLE_MODEL
        assert ADAPTER <= others.keys()
        pushed = hub.files()
    finally:
        hub.stop()
    expected = load_file(tmp_path / "logits.safetensors")
    for number, (files, prefix) in enumerate([(pushed, ""), (pushed, "last-checkpoint/"), (others, "")]):
        folder = tmp_path / f"pulled {number}"
        folder.mkdir()
        for name in ADAPTER:
            (folder / name).write_bytes(files[prefix + name])
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        with torch.no_grad():
            logits = PeftModel.from_pretrained(base, folder).eval()(expected["ids"]).logits
        torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=5e-5)
