"""The order of rooms, no circle anywhere, mathematics that knows no process group, recipes that nobody imports."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "adalora_dist"
ROOMS = ("io", "config", "sharding", "backbones", "tasks", "methods", "artifacts", "training")
"""From the ground up: a room imports from itself and from those before it."""
PURE = ("config", "methods/adalora/schedule", "methods/adalora/importance", "methods/adalora/orthogonality")
PURE += ("methods/adalora/digest", "methods/adalora/sums", "sharding/spans", "sharding/layout")
"""What never sees a process group."""
OF_ENGINES = {"DTensor", "to_local", "full_tensor", "FSDPModule", "reshard", "register_fsdp_forward_method"}
OF_ENGINES |= {"ds_id", "ds_numel", "ds_shape", "ds_tensor", "GatheredParameters", "empty_partition_cache"}
"""What engines do to tensors and models: said in sharding/ only, in which tensors.py answers for everybody else."""
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, anywhere in it, those for type checkers included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


MODULES = {module_of(path): path for path in FILES}


def edges() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""

    def resolve(name: str) -> str | None:
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        return name or None

    found = {}
    for module, path in MODULES.items():
        targets = {resolve(name) for name in imported(path) if name.startswith("adalora_dist.")}
        found[module] = {target for target in targets if target and target not in (module, "adalora_dist")}
    return found


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Some modules that import each other in a circle; none: []."""
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> list[str]:
        if module in way:
            return way[way.index(module) :]
        if module in done:
            return []
        for target in sorted(graph[module]):
            if circle := walk(target, [*way, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in sorted(graph) if (circle := walk(module, []))), [])


def words(source: str) -> set[str]:
    """Names, attributes, and strings that are one word (as getattr takes them); not comments, nor other text."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string.strip("\"'") for token in tokens if token.type in (tokenize.NAME, tokenize.STRING)}


def test_there_is_something_to_check():
    assert len(FILES) > 80 and sum(map(len, edges().values())) > 200
    assert {path.relative_to(PACKAGE).parts[0] for path in FILES if path.parent != PACKAGE} == set(ROOMS)
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"] and not circle_in({"a": {"b"}, "b": set()})


def test_what_tests_share_lies_in_support():
    """Not in a test module, which brings its own fixtures, engines and skips along."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        shared = {name for name in imported(path) if name.startswith("tests.")}
        assert all(name.startswith("tests.support.") for name in shared), f"{path} imports {sorted(shared)}"


def test_the_root_is_small():
    shown = [path.name for path in PACKAGE.iterdir() if not path.name.startswith("__pycache__")]
    assert len(shown) <= 11  # the rooms, __init__.py, __main__.py, py.typed


def test_no_file_is_in_a_circle():
    assert circle_in(edges()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    module = module_of(path)
    parts = module.split(".")
    for name in imported(path):
        assert not name.startswith(("recipes", "benchmarks", "tests")), f"{module} imports {name}"
        if len(parts) > 1 and name.startswith("adalora_dist.") and parts[1] in ROOMS:
            room = name.split(".")[1]
            assert ROOMS.index(room) <= ROOMS.index(parts[1]), f"{module} imports {name}, which stands above it"
        if "/".join(parts[1:]).startswith(PURE):
            assert not name.startswith("torch.distributed"), f"{module} is mathematics and imports {name}"
        if name.split(".")[0] == "deepspeed":
            assert parts[1:2] == ["sharding"] or module == "adalora_dist.training.engine"


def test_words_are_those_of_code():
    source = '"""reshard"s"""\n# ds_id\nx = getattr(p, "ds_numel", p.to_local()) or "DTensor and others"\n'
    assert words(source) & OF_ENGINES == {"ds_numel", "to_local"}
    said = {word for path in (PACKAGE / "sharding").glob("*.py") for word in words(path.read_text(encoding="utf-8"))}
    assert said >= OF_ENGINES


@pytest.mark.parametrize(
    "path",
    [
        *(path for path in FILES if path.parent != PACKAGE / "sharding"),
        *(path for folder in ("recipes", "benchmarks") for path in sorted((ROOT / folder).glob("*.py"))),
    ],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_what_engines_do_to_tensors_is_asked_in_sharding(path):
    assert not words(path.read_text(encoding="utf-8")) & OF_ENGINES


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_one_room_each(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 350


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda p: p.name)
def test_recipes_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 140


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda p: p.name)
def test_recipes_show_only_what_differs(path):
    """What all of them do is a verb of ``Run``."""
    rooms = [name.split(".")[1:3] for name in imported(path) if name.startswith("adalora_dist.")]
    used = {module for room, module in rooms if room == "training"}
    assert "run" in used and used <= {"run", "seeds", "dry_run", "report"}
    assert {room for room, _ in rooms} <= {"config", "io", "backbones", "tasks", "training"}
