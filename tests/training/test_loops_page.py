"""docs/loops.md runs as printed: loops of accelerate, DeepSpeed, Fabric, TRL and sentence-transformers."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.paths import ROOT
from tests.support.ranks import import_deepspeed, run_ranks
from tests.support.tiny_encoders import sentence_encoder
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama
from tests.support.trainer_runs import one_process

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "loops.md").read_text(encoding="utf-8")
SECTIONS = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for section in PAGE.split("\n## ")
}
FIRST, *LOOPS = [title for title, blocks in SECTIONS.items() if blocks]
NEEDS = {
    "DeepSpeed": ("deepspeed",), "Lightning Fabric": ("lightning_fabric",), "TRL with `peft_config`": ("trl",),
    "Preferences and rewards": ("trl",), "sentence-transformers": ("sentence_transformers",),
}  # fmt: skip
STEPS = 12


def run_section(rank: int, world_size: int, folder: str, title: str) -> dict[str, Any]:
    if title == "DeepSpeed":
        import_deepspeed().init_distributed("gloo")
    else:
        one_process()
    os.chdir(folder)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained("base")
    tiny_llama(len(tokenizer), hidden_size=16).save_pretrained("base")
    ids = torch.arange(3, 11).view(1, 8)
    names: dict[str, Any] = {"base": "base", "tokenizer": tokenizer, "steps": STEPS, "peft": peft}
    names["batches"] = [dict.fromkeys(("input_ids", "labels"), (ids + k).repeat(4, 1)) for k in range(STEPS)]
    if title == "sentence-transformers":
        names["sentence_encoder"] = sentence_encoder("encoder base")
    before = [TRL_NAMES] * (title in ("Preferences and rewards", "sentence-transformers"))
    found: dict[str, Any] = {}
    for block in [*SECTIONS[FIRST], *before, *SECTIONS[title]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # total_step
            exec(compile(block, "docs/loops.md", "exec"), names)
        hooks = names["trainer"].adalora.hooks if "trainer" in names else names.get("hooks")
        if hooks is not None:
            found.setdefault("mean ranks", []).append(sum(hooks.rank_pattern().values()) / len(hooks.rank_pattern()))
    if "reference" in names:
        found["reference"] = names["reference"]
        found["plain"] = AutoModelForCausalLM.from_pretrained("base")(**names["batches"][0]).logits
    return found


TRL_NAMES = """
from datasets import Dataset
peft_config = peft.AdaLoraConfig(init_r=3, target_r=2, tfinal=4, total_step=12, target_modules="all-linear")
"""


@pytest.mark.parametrize("title", LOOPS)
def test_the_loop_runs_as_printed_and_meets_the_budget(title: str, tmp_path: Path) -> None:
    if missing := [name for name in NEEDS.get(title, ()) if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    [found] = run_ranks(1, run_section, str(tmp_path), title)
    assert set(found["mean ranks"]) == {2.0}
    if "reference" in found:
        torch.testing.assert_close(found["reference"], found["plain"])
