"""The JSON schema of a recipe's YAML: what is shipped is valid by it, and mistakes are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from adalora_dist.__main__ import main
from adalora_dist.config.json_schema import json_schema
from adalora_dist.config.methods import METHODS
from adalora_dist.io.shipped import files_of
from adalora_dist.tasks.sft.config import SftConfig
from adalora_dist.training.recipe_file import schema_of as schema_of_recipe
from tests.support.refusals import refusal
from tests.support.shipped import SCHEMAS, schema_of

jsonschema = pytest.importorskip("jsonschema")


def problems(schema: dict[str, Any], text: str) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(yaml.safe_load(text))]


@pytest.mark.parametrize("path", files_of("config"), ids=lambda path: path.stem)
def test_what_is_shipped_is_valid(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert problems(json_schema(schema_of(path), "t"), text) == []
    [recipe] = [recipe for recipe, schema in SCHEMAS.items() if schema is schema_of(path)]
    assert text.startswith(f"# yaml-language-server: $schema={recipe}.schema.json\n")


def test_it_is_a_schema_and_says_what_settings_are() -> None:
    schema = json_schema(SftConfig, "What it reads")
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["title"] == "What it reads" and set(schema["properties"]) == set(SftConfig.model_fields)
    adapter = schema["properties"]["adapter"]["properties"]
    assert set(METHODS) <= set(adapter) and adapter["method"]["enum"] == list(METHODS)
    assert adapter["init_rank"]["description"].startswith("Rank r of every adapted matrix")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("adapter: {init_rnk: 3}", "init_rnk"),
        ("adaptr: {}", "adaptr"),
        ("adapter: {init_rank: 0}", "minimum"),
        ("adapter: {method: lorra}", "lorra"),
        ("adapter: {lora: {target_rank: 3}}", "target_rank"),
        ("train: {precision: fp8}", "fp8"),
        ("train: {epochs: many}", "many"),
    ],
)
def test_mistakes_are_seen(text: str, says: str) -> None:
    [problem] = problems(json_schema(SftConfig, "t"), text)
    assert says in problem
    assert problems(json_schema(SftConfig, "t"), "adapter: {init_rank: 3, lora: {alpha: 2}}\ntrain:\n") == []
    for budget in ("331776", "0.32%", "null"):
        assert problems(json_schema(SftConfig, "t"), f"adapter: {{budget: {budget}}}") == []


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["schema", "llama_sft"])
    assert json.loads(capsys.readouterr().out) == json_schema(SftConfig, "What llama_sft reads with --config")
    for recipe, schema in SCHEMAS.items():
        assert schema_of_recipe(recipe).__name__ == schema.__name__
    (tmp_path / "other.py").write_text("def configuration(argv): ...\n")
    assert "is no recipe: it must have a function configuration" in refusal(
        schema_of_recipe, str(tmp_path / "other.py")
    )
