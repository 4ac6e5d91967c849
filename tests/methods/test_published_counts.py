"""Every published count of trained parameters of other methods' tables, counted on the shapes of the real models."""

from __future__ import annotations

import functools
import tomllib
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaModel,
)

from adalora_dist.config.flags import parse_config
from adalora_dist.config.methods import METHODS, method_config
from adalora_dist.methods import method_for
from tests.support.paths import ROOT, shared
from tests.support.shipped import CONFIGS, schema_of

COUNTS = ROOT / "tests" / "data" / "method_counts.toml"
ROWS: dict[str, dict[str, Any]] = tomllib.loads(COUNTS.read_text(encoding="utf-8"))
DO_NOT_FOLLOW = {
    "LoRA GPT-2 medium r4 Wq,Wv",
    "LoRA GPT-2 large r4 Wq,Wv",
    "AdptH GPT-2 medium d112",
    "LoRA-FA RoBERTa-large",
}
"""By name: figures that no count gives."""


@functools.cache
def model(name: str) -> Any:
    """On meta. GPT-2 has query, key and value in one matrix; ``..., query and value apart`` is of its sizes only."""
    architecture, _, apart = name.partition(", ")
    config = AutoConfig.from_pretrained(CONFIGS / "architectures" / f"{architecture}.json")
    with torch.device("meta"):
        if apart:
            sizes = {"hidden_size": config.n_embd, "num_hidden_layers": config.n_layer, "vocab_size": 8}
            return LlamaModel(LlamaConfig(**sizes, num_attention_heads=config.n_head))
        kinds = {"roberta": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}
        return kinds.get(config.model_type, AutoModel).from_config(config)


def counted(row: dict[str, Any]) -> int:
    """By the package where it has the method."""
    if row["method"] in METHODS:
        method = method_for(method_config(row["method"], **row.get("settings", {})))
        return method.sizes(model(row["model"])).count(row["size"]) + row.get("besides", 0)
    assert row["method"] == "prefix"  # keys and values of every layer
    config = model(row["model"]).config
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * width * row["size"]


def printed(row: dict[str, Any], rounding: str) -> str:
    """The count as the table would print it."""
    number, unit = row["published"][:-1], row["published"][-1]
    if unit == "M":
        value = Decimal(row["count"]) / 1_000_000
    else:
        assert unit == "%"
        base = sum(p.numel() for p in model(row["model"]).parameters())
        value = 100 * Decimal(row["count"]) / (base + row["count"])
    return f"{value.quantize(Decimal(number), rounding)}{unit}"


def test_there_are_rows_of_every_kind() -> None:
    assert len(ROWS) >= 35 and {row["follows"] for row in ROWS.values()} == {"rounded", "cut", "does not follow"}
    assert {name for name, row in ROWS.items() if row["follows"] == "does not follow"} == DO_NOT_FOLLOW
    counted = {row["method"] for row in ROWS.values()}
    assert counted >= {"lora", "lora_fa", "dora", "vera", "dvora", "hydra", "dylora", "bitfit", "prefix"}
    assert counted >= {"houlsby", "pfeiffer", "adapterdrop", "series", "parallel"} and "lora" in METHODS


@pytest.mark.parametrize("name", ROWS)
def test_the_count_is_that_of_the_row(name: str) -> None:
    assert counted(ROWS[name]) == ROWS[name]["count"]


@pytest.mark.parametrize("name", ROWS)
def test_the_published_figure_follows_from_it_or_is_named(name: str) -> None:
    row = ROWS[name]
    rounded, cut = (printed(row, how) for how in (ROUND_HALF_UP, ROUND_DOWN))
    if row["follows"] == "rounded":
        assert rounded == row["published"]
    elif row["follows"] == "cut":
        assert cut == row["published"] != rounded
    else:
        assert name in DO_NOT_FOLLOW and row["published"] not in (rounded, cut) and row["why"]


def test_no_published_row_is_left_out() -> None:
    """Against the shared list of counts, where it lies beside the project."""
    listed = shared("spec/published_methods.toml").read_text(encoding="utf-8")
    expected = tomllib.loads(listed)["parameter_counts"]
    numbers = {count for _, *counts in expected.values() for count in counts if count}
    assert len(expected) >= 28 and numbers <= {row["count"] for row in ROWS.values()}


PRESETS = {
    "deberta_glue_roberta_base": {"lora": 294_912, "vera": 43_008, "hydra": 331_776, "adapterdrop": 894_528},
    "deberta_glue_roberta_large": {"lora": 786_432, "vera": 61_440, "pfeiffer": 3_171_840, "houlsby": 6_343_680},
    "gpt2_e2e_large": {"lora": 737_280, "vera": 175_104, "pfeiffer": 783_648},
    "llama_commonsense_llama_7b": {
        "lora": 56_098_816, "dora": 56_975_360, "series": 67_108_864, "parallel": 247_463_936,
    },
    "llama_commonsense_llama_13b": {
        "lora": 87_818_240, "dora": 89_190_400, "series": 104_857_600, "parallel": 387_973_120,
    },
    "llama_sft_alpaca_llama_7b": {"lora": 159_907_840, "dora": 161_267_712, "vera": 1_589_248, "dvora": 2_949_120},
}  # fmt: skip
"""Of files of settings: what each method's section of them trains. Where a row of the table above has another number,
the file says why."""


@pytest.mark.parametrize(("stem", "method"), [(stem, method) for stem, counts in PRESETS.items() for method in counts])
def test_files_of_settings_have_the_published_sizes(stem: str, method: str) -> None:
    path = CONFIGS / f"{stem}.yaml"
    config: Any = parse_config(schema_of(path), ["--config", str(path), "--method", method])
    sizes = method_for(config.adapter).sizes(model(config.model.name.rpartition("/")[2]))
    size = next(iter(config.adapter.sized_by))
    assert sizes.count(getattr(config.adapter, size)) == PRESETS[stem][method]


def test_published_sizes_are_in_some_file() -> None:
    counted = {count for counts in PRESETS.values() for count in counts.values()}
    rows = {row["count"] for row in ROWS.values() if row["follows"] != "does not follow"}
    assert len(counted & rows) >= 18
