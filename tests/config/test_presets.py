"""Every shipped YAML and JSON, and every row of every table of presets, against the published numbers."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from adalora_dist.config.flags import parse_config
from adalora_dist.config.presets import PresetTable
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.schedule import BudgetSchedule
from adalora_dist.tasks.glue.config import GlueConfig
from tests.support.paths import ROOT
from tests.support.shipped import (
    CONFIGS,
    NUMBERS,
    ROWS,
    SCHEMAS,
    SHIPPED,
    TABLES,
    flags_of,
    lacking,
    schema_of,
    table_of,
)

NUM_MATRICES = 72


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return json.loads(NUMBERS.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------ published, one by one

# Name in the published tables -> setting here.
SETTINGS: dict[str, Callable[[Any], Any]] = {
    "lr": lambda run: run.train.learning_rate,
    "epochs": lambda run: run.train.epochs,
    "gamma": lambda run: run.adapter.orthogonality,
    "t_i": lambda run: run.adapter.initial_warmup_steps,
    "dT": lambda run: run.adapter.mask_interval_steps,
    "t_f": lambda run: run.adapter.final_steps,
    "max_len": lambda run: run.data.max_length,
    "doc_stride": lambda run: run.data.doc_stride,
    "warmup_steps": lambda run: run.train.lr_warmup_steps,
    "warmup_ratio": lambda run: run.train.lr_warmup_ratio,
    "weight_decay": lambda run: run.train.weight_decay,
    "cls_dropout": lambda run: run.model.classifier_dropout,
    "alpha": lambda run: run.adapter.alpha,
}


def published_glue(spec: dict[str, Any], row: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any], int, int]:
    """(numbers of the task, ranks of the budgets, batch size, training rows)."""
    name = {"sst2": "SST-2", "stsb": "STS-B", "cola": "CoLA"}.get(row["task"], row["task"].upper())
    numbers = spec["glue"][name]
    if row["preset"] == "code":
        numbers = numbers | spec["glue"]["code_differs"].get(name, {})
    return numbers | {"seed": spec["glue"]["seed"]}, spec["glue"]["ranks"], 32, spec["datasets"]["glue"][name]["train"]


def published_squad(spec: dict[str, Any], row: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any], int, int]:
    numbers = spec["squad"][row["task"]] | {"seed": spec["squad"]["seed"]}
    return numbers, spec["qa_and_summarization"]["ranks"], 16, spec["datasets"]["squad"][row["task"]]["train"]


PUBLISHED = {"deberta_glue": published_glue, "deberta_squad": published_squad}
PUBLISHED_ROWS = [(path, row) for path, row in ROWS if path.stem in PUBLISHED]


@pytest.mark.parametrize(
    ("path", "row"), PUBLISHED_ROWS, ids=[f"{p.stem}-{'-'.join(r.values())}" for p, r in PUBLISHED_ROWS]
)
def test_row_has_the_published_numbers(path: Path, row: dict[str, str], spec: dict[str, Any]) -> None:
    run: Any = parse_config(schema_of(path), flags_of(row), table=path)
    numbers, ranks, batch_size, num_rows = PUBLISHED[path.stem](spec, row)
    seed = numbers.pop("seed")
    assert len(numbers) >= 9
    for name in lacking(row["method"]):
        with pytest.raises(AttributeError, match=type(run.adapter).__name__):
            SETTINGS[name](run)
    for name, value in numbers.items():
        if name in lacking(row["method"]):
            continue
        assert SETTINGS[name](run) == pytest.approx(value), name
    if "warmup_ratio" in numbers:
        assert run.train.lr_warmup_steps is None
    assert (run.train.batch_size, run.train.seed, run.train.lr_schedule) == (batch_size, seed, "linear")
    if row["method"] == "adalora":
        assert (run.adapter.beta1, run.adapter.beta2) == (0.85, 0.85)
    if row["method"] in ("adalora", "lora"):
        assert run.adapter.dropout == 0.0
    assert (run.model.name, run.data.source) == ("microsoft/deberta-v3-base", "hub")
    assert (run.adapter.method, run.data.task) == (row["method"], row["task"])
    if "budget" in row:
        published = ranks[row["budget"]]
        if row["method"] == "lora":
            assert run.adapter.init_rank == published["lora_r"]
            assert run.adapter.init_rank * NUM_MATRICES == published["budget"]  # equal final budget
        else:
            assert (run.adapter.init_rank, run.adapter.target_rank) == (published["initial"], published["final"])
            assert run.adapter.target_rank * NUM_MATRICES == published["budget"]
    if row["method"] == "adalora":  # the schedule fits into the run
        schedule = BudgetSchedule.for_run(
            total_steps=round(run.train.epochs * (num_rows // batch_size)),
            initial_budget=run.adapter.init_rank * NUM_MATRICES,
            target_budget=round(run.adapter.target_rank * NUM_MATRICES),
            initial_warmup_steps=run.adapter.initial_warmup_steps,
            final_steps=run.adapter.final_steps,
            mask_interval_steps=run.adapter.mask_interval_steps,
        )
        assert schedule.num_allocations > 10


def test_tables_have_every_published_row(spec: dict[str, Any]) -> None:
    """As many as the paper has: nothing was left out."""
    count = {name: [row for path, row in ROWS if path.stem == name] for name in PUBLISHED}
    assert len(count["deberta_glue"]) == 2 * 8 * (2 * 3 + 2)
    assert len(count["deberta_squad"]) == 1 * 2 * (2 * 4 + 2)
    assert {row["budget"] for row in count["deberta_glue"] if "budget" in row} == set(spec["glue"]["ranks"])
    squad = {row["budget"] for row in count["deberta_squad"] if "budget" in row}
    assert squad == set(spec["qa_and_summarization"]["ranks"])


# -------------------------------------------------------------------------------------------------- every shipped file


def test_there_are_files_to_check() -> None:
    assert len(ROWS) >= 148 and len(SHIPPED) >= 18
    assert {path.stem for path in TABLES} == {*PUBLISHED, "summarize_bart"}  # that one's rows: test_dry_run.py


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_file_is_read_by_what_it_is_for(path: Path) -> None:
    if path.parent.name == "architectures":
        kinds = ("llama", "deberta-v2", "bert", "bart", "gpt2", "roberta", "qwen3_moe", "mixtral")
        assert AutoConfig.from_pretrained(path).model_type in kinds
    elif path.suffix == ".json":
        assert json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]["stage"] in (1, 2, 3)
    elif path.parent.name == "accelerate":
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert content["distributed_type"] in ("MULTI_GPU", "FSDP", "DEEPSPEED")
        assert content["num_processes"] == math.prod(content.get("parallelism_config", {"shards": 2}).values())
    elif path.parent.name == "tables":
        assert table_of(path).axes[0] == "preset"
    else:
        assert path.parent == CONFIGS
        run = parse_config(schema_of(path), ["--config", str(path)])
        named = run.model.name or getattr(run.model, "size", "demo") != "demo"  # or is made, in a published size
        assert path.stem.endswith("demo") != bool(named)


OWN_HEADERS = [path for recipe in ("deberta", "summarize", "gpt2") for path in CONFIGS.glob(f"{recipe}_*.yaml")]


@pytest.mark.parametrize("path", [*TABLES, *OWN_HEADERS], ids=lambda path: path.name)
def test_commands_in_the_header_parse(path: Path) -> None:
    header = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    joined = "\n".join(header).replace("\\\n", "")
    commands = [line for line in joined.splitlines() if line.startswith(("accelerate launch", "deepspeed", "..."))]
    assert len(commands) >= 2
    [recipe] = [recipe for recipe in SCHEMAS if path.stem.startswith(recipe)]
    table = CONFIGS / "tables" / f"{recipe}.yaml"
    for command in commands:
        words = shlex.split(command, comments=True)
        num_before = {"accelerate": 3, "deepspeed": 2, "...": 1}[words[0]]
        assert words[0] == "..." or words[num_before - 1] in (f"recipes/{recipe}.py", f"launch/{recipe}.sh")
        assert words[0] == "..." or (ROOT / words[num_before - 1]).is_file()
        parse_config(schema_of(path), words[num_before:], table=table if table.exists() else None)


# -------------------------------------------------------------------------------------------------- the mechanism

SMALL = """
train: {batch_size: 4}
preset: {paper: {}, code: {}}
task:
  cola:
    data: {max_length: 64}
    preset: {paper: {adapter: {alpha: 2}}, code: {adapter: {alpha: 3}}}
  rte: {data: {max_length: 32}}
method:
  adalora: {budget: {0.3M: {adapter: {init_rank: 4, target_rank: 2}}}}
  lora: {}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_deeper_settings_win_and_flags_over_all(small: Path, tmp_path: Path) -> None:
    words = ["--preset", "code", "--task", "cola", "--budget", "0.3M"]
    run = parse_config(GlueConfig, words, table=small)
    assert (run.adapter.alpha, run.adapter.init_rank, run.data.max_length, run.train.batch_size) == (3, 4, 64, 4)
    assert run.adapter.train_modules == ("task-head",)  # of the recipe's schema
    file = tmp_path / "own.yaml"
    file.write_text("adapter: {alpha: 5, init_rank: 7}\ndata: {task: cola}\n")
    run = parse_config(GlueConfig, [*words[:2], *words[4:], "--config", str(file), "--init-rank", "8"], table=small)
    assert (run.adapter.alpha, run.adapter.init_rank, run.adapter.target_rank, run.data.task) == (5, 8, 2, "cola")


def test_a_budget_is_a_row_of_a_preset_or_a_number_without_one(small: Path, tmp_path: Path) -> None:
    words = ["--task", "cola", "--budget", "0.3M"]
    run = parse_config(GlueConfig, words, table=small)
    assert run.adapter.budget == "0.3M" and run.data.max_length == GlueConfig().data.max_length  # no row was taken
    run = parse_config(GlueConfig, [*words, "--preset", "paper"], table=small)
    assert (run.adapter.budget, run.adapter.init_rank, run.adapter.target_rank) == (None, 4, 2)
    file = tmp_path / "own.yaml"
    file.write_text("adapter: {budget: 0.3M}\n")
    assert parse_config(GlueConfig, [*words[:2], "--preset", "paper", "--config", str(file)], table=small) == run


def test_rows_are_all_that_resolve_and_nothing_else_does(small: Path) -> None:
    table = PresetTable(small, tuple(GlueConfig.model_fields))
    rows = list(table.rows())
    assert len(rows) == 8 and len({tuple(sorted(row.items())) for row in rows}) == 8
    for row in rows:
        assert table.resolve(row)["train"] == {"batch_size": 4}
    assert table.axes == ("preset", "task", "method", "budget")


MISTAKES = {
    "--preset paper --task cola": ["--budget is not set", "0.3M"],
    "--preset paper --task cola --budget 0.4M": ["--budget 0.4M has no row in small.yaml", "0.3M"],
    "--preset papr --task cola --budget 0.3M": ["--preset papr has no row", "paper, code"],
    "--preset paper --task mnli --budget 0.3M": ["--task mnli has no row", "cola, rte"],
    "--preset paper --task cola --budget 0.3M --method lora": ["--budget 0.3M is not read", "method lora", "leave it"],
    "--preset paper --task cola --budget 0.3M --method head": ["--method head has no row", "adalora, lora"],
    "--presett paper": ["--presett is not a flag", "--preset"],
    "--preset paper code": ["--preset takes one value"],
    "--preset": ["--preset has no value"],
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_get_one_line(small: Path, capsys: pytest.CaptureFixture[str], arguments: str) -> None:
    with pytest.raises(SystemExit):
        parse_config(GlueConfig, arguments.split(), table=small)
    [line] = capsys.readouterr().err.splitlines()
    assert all(part in line for part in MISTAKES[arguments]), line


def test_a_value_of_a_table_that_is_wrong_names_its_row(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.write_text(SMALL.replace("alpha: 3", "alpha: -3"))
    with pytest.raises(SystemExit):
        parse_config(GlueConfig, "--preset code --task cola --budget 0.3M".split(), table=small)
    assert "adapter.alpha: -3: must be a number > 0" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["preset: paper\n", "preset: {paper: 3}\n", "tain: {batch_size: 3}\n"])
def test_what_is_neither_section_nor_axis_is_refused(small: Path, text: str) -> None:
    small.write_text(text)
    with pytest.raises(UserError, match="is no section, so it must map"):
        PresetTable(small, tuple(GlueConfig.model_fields))


def test_help_names_the_flags_that_pick(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(GlueConfig, ["--help"], "Text.", small)
    shown = capsys.readouterr().out
    assert "--preset" in shown and "--budget" in shown and "paper, code" in shown
