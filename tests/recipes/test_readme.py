"""What the README promises exists: its files, its flags, and its code runs as printed."""

import re

import torch

from adalora_dist.config.flags import parse_config
from adalora_dist.tasks.commonsense.config import CommonsenseConfig
from tests.support.models import Net, global_batch
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def test_the_map_names_existing_files_and_leaves_none_out():
    block = next(text for _, text in BLOCKS if text.startswith("adalora_dist/"))
    package = block[: block.index("recipes/")]
    named = set(re.findall(r"[\w/]+\.py|\w+/(?=\s)", package))
    for name in named:
        candidates = [ROOT / "adalora_dist" / name, ROOT / "adalora_dist" / "sharding" / name, ROOT / name]
        assert any(path.exists() for path in candidates), name
    for path in (ROOT / "adalora_dist").iterdir():
        if path.name not in ("__init__.py", "__pycache__", "py.typed"):
            assert path.name in package, f"{path.name} is not in the README's map"
    for name in re.findall(r"^(\w+)/", block, re.MULTILINE):
        assert (ROOT / name).is_dir(), name


def test_paths_and_flags_of_the_commands_are_real():
    commands = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if "launch" in line]
    assert len(commands) >= 5
    for line in commands:
        for path in re.findall(r"(?:recipes|launch)/[\w/.]+", line):
            assert (ROOT / path).exists(), path
        if "recipes/" in line:
            flags = line.split(".py", 1)[1].replace("...", str(ROOT / "recipes/configs/llama_commonsense_demo.yaml"))
            parse_config(CommonsenseConfig, flags.split())
    assert [line for line in commands if line.endswith("accelerate launch recipes/llama_commonsense.py")]


def test_the_lines_for_your_own_code_run(monkeypatch):
    code = next(text for kind, text in BLOCKS if kind == "python" and "attach(" in text)
    assert "\n...  " in code
    before, after = re.split(r"\n\.\.\. .*\n", code)
    names = {"torch": torch, "model": Net(), "total_steps": 30}
    code = before.replace("init_rank=12, target_rank=8", 'init_rank=3, target_rank=2, targets=("up", "down")')
    exec(compile(code, "README", "exec"), names)
    for step in range(30):
        x, y = global_batch(step)
        (names["model"](x) - y).square().mean().backward()
        names["optimizer"].step()
        names["optimizer"].zero_grad()
    exec(compile(after, "README", "exec"), names)
    assert sum(names["hooks"].rank_pattern().values()) == 8
