"""Imports point down only, mathematics knows no process group, recipes are imported by nobody."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "adalora_dist"
LEVELS = {
    0: (
        *("errors", "config", "recipe_config", "schedule", "importance", "orthogonality", "spans", "flat"),
        *("pattern_digest", "progress", "base_files", "markdown", "redaction", "foreign_files", "adapter_files"),
    ),
    1: ("agreement", "lambdas", "layers", "inject", "peft_import"),
    2: ("sharding",),
    3: (
        *("allocator", "compaction", "checkpoint", "checkpoint_content", "checkpoint_files"),
        *("export", "peft_format", "pictures", "hub_files", "card", "hub"),
    ),
    4: ("cli", "main", "commands", "yaml_file", "presets", "training", "data", "evaluation", "integrations"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def level(module: str) -> int:
    """Level of adalora_dist.X..., by X."""
    part = module.split(".")[1]
    return next(number for number, parts in LEVELS.items() if part in parts)


def test_there_is_something_to_check():
    assert len(FILES) > 20 and {level(f"adalora_dist.{p}") for parts in LEVELS.values() for p in parts} == set(LEVELS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if module == "adalora_dist.__init__":
        assert not imported(path)
        return
    own = level(module)
    for name in imported(path):
        if name.startswith("adalora_dist."):
            assert level(name) <= own, f"{module} (level {own}) imports {name} (level {level(name)})"
        assert not name.startswith("recipes"), f"{module} imports a recipe"
        if own == 0:
            assert not name.startswith("torch.distributed"), f"{module} is mathematics and imports {name}"
        if name.split(".")[0] == "deepspeed":
            assert module in ("adalora_dist.sharding.zero", "adalora_dist.training.engine")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda p: p.name)
def test_recipes_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
