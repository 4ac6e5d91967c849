"""The settings that are shipped, and the published numbers that they are checked against."""

from __future__ import annotations

from pathlib import Path

from adalora_dist.config.presets import PresetTable
from adalora_dist.config.sections import RunConfig
from adalora_dist.tasks.commonsense.config import CommonsenseConfig
from adalora_dist.tasks.e2e.config import E2EConfig
from adalora_dist.tasks.glue.config import GlueConfig
from adalora_dist.tasks.pretrain.config import PretrainConfig
from adalora_dist.tasks.sft.config import SftConfig
from adalora_dist.tasks.squad.config import SquadConfig
from adalora_dist.tasks.summarization.config import SummarizationConfig
from tests.support.paths import ROOT

NUMBERS = ROOT / "tests" / "data" / "published.json"
CONFIGS = ROOT / "recipes" / "configs"

SCHEMAS: dict[str, type[RunConfig]] = {
    "llama_commonsense": CommonsenseConfig,
    "deberta_glue": GlueConfig,
    "deberta_squad": SquadConfig,
    "summarize_bart": SummarizationConfig,
    "gpt2_e2e": E2EConfig,
    "llama_sft": SftConfig,
    "llama_pretrain": PretrainConfig,
}
"""By the recipe that a file's name begins with."""


def schema_of(path: Path) -> type[RunConfig]:
    [schema] = [schema for recipe, schema in SCHEMAS.items() if path.stem.startswith(recipe)]
    return schema


def table_of(path: Path) -> PresetTable:
    return PresetTable(path, tuple(schema_of(path).model_fields))


def flags_of(row: dict[str, str]) -> list[str]:
    return [word for axis, choice in row.items() for word in (f"--{axis}", choice)]


TABLES = sorted((CONFIGS / "tables").glob("*.yaml"))
ROWS = [(path, row) for path in TABLES for row in table_of(path).rows()]
SHIPPED = sorted(
    path
    for folder in ("recipes", "launch", "ds_configs")
    for suffix in ("*.yaml", "*.yml", "*.json")
    for path in (ROOT / folder).rglob(suffix)
)

OF_LOW_RANK, OF_ADALORA = {"alpha"}, {"gamma", "t_i", "dT", "t_f"}
"""Names of settings that not every method has; a row's other methods leave them out."""


def lacking(method: str) -> set[str]:
    """Names of published numbers that a method has no setting for."""
    return {"adalora": set(), "lora": OF_ADALORA}.get(method, OF_ADALORA | OF_LOW_RANK)
