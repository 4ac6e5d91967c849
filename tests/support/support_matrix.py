"""The table of docs/methods.md: which method runs on which engine, over which weights, and what it can be written as.

    python -m tests.support.support_matrix --write

Made of what there is: engines are those that a method's tests start, quantisations and formats those that its settings
are not refused with. A cell that no test stands for is empty.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from adalora_dist.config.formats import EXPORT_FORMATS
from adalora_dist.config.methods import METHODS, SizedConfig, method_config
from adalora_dist.config.sections import ExportConfig, QuantizationConfig, RunConfig
from adalora_dist.io.errors import UserError
from adalora_dist.io.markdown import table
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- made by python -m tests.support.support_matrix --write -->", "<!-- end of what is made -->"

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
QUANTIZATIONS = ("nf4", "fp4", "int8", "fp8")
COMMON = "tests/methods/test_all_methods.py"
"""Goes through losses, resume elsewhere and exports of every method that its SETTINGS list, on its ENGINES."""
OWN: dict[str, str] = {
    "adalora": "tests/sharding/test_parity.py",
    "relora": "tests/methods/test_relora.py",
    "galore": "tests/methods/test_galore.py",
    "low_rank": "tests/methods/test_low_rank.py",
    "head": "tests/recipes/test_glue.py",
    "full": "tests/recipes/test_glue.py",
}
"""Of methods that are not in it: a file whose cases name the engines; where cases name methods, too, those of it."""
YES, NO = "yes", "–"


def _tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def in_common() -> dict[str, tuple[str, ...]]:
    """Method -> engines, of the tests that all methods share."""
    found: dict[str, ast.expr] = {}
    for node in _tree(COMMON).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found[node.target.id] = node.value
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
    variants = [method for method, _ in ast.literal_eval(found["VARIANTS_OF"]).values()]
    return dict.fromkeys([*ast.literal_eval(found["SETTINGS"]), *variants], ast.literal_eval(found["ENGINES"]))


def tested_engines(method: str) -> set[str]:
    """Those that the method's tests start."""
    engines = set(in_common().get(method, ()))
    is_shared = list(OWN.values()).count(OWN.get(method, "")) > 1
    for node in ast.walk(_tree(OWN[method])) if method in OWN else ():
        elements = (
            node.elts if isinstance(node, ast.Tuple | ast.List) else node.args if isinstance(node, ast.Call) else []
        )
        words = {element.value for element in elements if isinstance(element, ast.Constant)}
        if method in words or not is_shared:
            engines |= words & {*ENGINES}
    return engines


def may(method: str, **sections: object) -> bool:
    """Whether a run with these settings is not refused."""
    formats = ExportConfig(export_formats=())
    try:
        RunConfig(**{"adapter": method_config(method), "export": formats, **sections})  # type: ignore[arg-type]
    except UserError:
        return False
    return True


def row_of(method: str) -> dict[str, str]:
    config, engines = METHODS[method], tested_engines(method)
    row = {"method": f"`{method}`", "`--budget`": YES if issubclass(config, SizedConfig) else NO}
    row |= {engine: YES if engine in engines else "" for engine in ENGINES}
    for quantization in QUANTIZATIONS:
        fits = may(method, quantization=QuantizationConfig(quantization=quantization))
        row[quantization] = YES if fits else NO
    row |= {form: YES if form in config.formats else NO for form in EXPORT_FORMATS}
    return row | {"own folder": YES if config.has_adapters and not config.trains_backbone else NO}


def matrix() -> str:
    return table([row_of(method) for method in METHODS])


def page_with_matrix(page: str) -> str:
    """The page with the table as it is now between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{matrix()}\n\n{END}{after}"


def main(path: Path = PAGE) -> None:
    page = page_with_matrix(path.read_text(encoding="utf-8"))
    if "--write" in sys.argv[1:]:
        path.write_text(page, encoding="utf-8")
    else:
        print(matrix())


if __name__ == "__main__":
    main()
