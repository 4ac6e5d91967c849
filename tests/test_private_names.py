"""Names that torch does not promise: which there are, and that this torch has them.

A range of versions in pyproject.toml is only as good as this list: a new torch is let in when the suite passes on it.
"""

import ast
import importlib

import pytest

from tests.support.paths import ROOT

KNOWN = {
    "torch._C._DisableTorchDispatch",
    "torch._C._current_graph_task_id",
    "torch._C._distributed_c10d._register_comm_hook",
    "torch._dynamo.config.patch",
    "torch._dynamo.exc.TorchDynamoException",
    "torch._foreach_add_",
    "torch._foreach_copy_",
    "torch._foreach_mul",
    "torch._foreach_mul_",
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset",
    "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._pytree.tree_leaves",
}


def private_names() -> set[str]:
    """Of torch, in the code of the package: imported, or reached by attributes from ``torch``."""
    found = set()
    for path in (ROOT / "adalora_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "torch" and any(p.startswith("_") and not p.startswith("__") for p in parts):
                    found.add(name)
    # of torch._C and torch._C._x the longer one is the use
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def test_they_are_few_and_known() -> None:
    assert private_names() == KNOWN


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_this_torch_has_it(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError:
        module, _, middle = module.rpartition(".")
        found = getattr(importlib.import_module(module), middle)
    assert callable(getattr(found, attribute))
