"""The public names: which there are, that they cost no torch until asked for, and that the page about them runs."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import adalora_dist
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks
from tests.support.tiny_language_model import tiny_llama

NAMES = {
    *("AdaLoraConfig", "LoraConfig", "HeadConfig", "FullConfig", "method_config", "UserError"),
    *("within_budget", "adapt", "parameter_groups", "attach", "MethodHooks", "AdaLoraCallback"),
    *("convert_peft", "without_adapters", "pack_adapters"),
    *("save_adapter", "load_adapter", "merge", "save_lora", "save_adalora", "push"),
}
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_names_are_these() -> None:
    assert set(adalora_dist.__all__) == NAMES
    for name in NAMES:
        assert getattr(adalora_dist, name).__name__ == name
        assert name in dir(adalora_dist) and f"`{name}" in PAGE
    with pytest.raises(AttributeError, match="no attribute 'nonsense': it has"):
        _ = adalora_dist.nonsense


def test_type_checkers_see_the_same() -> None:
    tree = ast.parse(Path(adalora_dist.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "__future__"]
    found = {alias.name: node.module for node in imports for alias in node.names if node.module != "typing"}
    assert found == {name: f"adalora_dist.{home}" for name, home in adalora_dist._HOMES.items()}
    assert (ROOT / "adalora_dist" / "py.typed").exists()


@pytest.mark.parametrize("statement", ["import adalora_dist", "from adalora_dist import AdaLoraConfig, UserError"])
def test_no_torch_until_it_is_needed(statement: str) -> None:
    code = f"{statement}\nimport sys\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def run_page(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    base = Path(folder) / "base"
    tiny_llama(31).save_pretrained(base)
    names: dict[str, Any] = {"model": AutoModelForCausalLM.from_pretrained(base), "base": base}
    names["plain"] = AutoModelForCausalLM.from_pretrained(base)
    tokens = torch.arange(12).view(2, 6)
    names["batches"] = [{"input_ids": tokens, "labels": tokens}] * 20
    os.chdir(folder)
    for block in BLOCKS:
        exec(compile(block, "docs/api.md", "exec"), names)
    merged = AutoModelForCausalLM.from_pretrained("merged")
    with torch.no_grad():
        logits = [m(input_ids=tokens).logits for m in (names["model"].eval(), merged, names["plain"])]
    return {"logits": logits, "ranks": sum(names["hooks"].rank_pattern().values())}


def test_the_page_runs_as_printed(tmp_path: Path) -> None:
    assert len(BLOCKS) == 6
    [result] = run_ranks(1, run_page, str(tmp_path))
    trained, merged, loaded = result["logits"]
    torch.testing.assert_close(merged, trained, rtol=0, atol=5e-5)
    torch.testing.assert_close(loaded, trained, rtol=0, atol=5e-5)
    assert result["ranks"] == 2 * 4
