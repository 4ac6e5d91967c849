"""Settings per method: each has its own, and one that it lacks is refused wherever it comes from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from adalora_dist.config.flags import parse_config
from adalora_dist.config.formats import EXPORT_FORMATS
from adalora_dist.config.methods import (
    METHODS,
    AdaLoraConfig,
    BitFitConfig,
    DoraConfig,
    FullConfig,
    HeadConfig,
    LoraConfig,
    MethodConfig,
    method_config,
    settings_of,
)
from adalora_dist.config.sections import ExportConfig, ModelConfig, QuantizationConfig, RunConfig, TrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.tasks.commonsense.config import CommonsenseConfig
from adalora_dist.tasks.glue.config import GlueConfig
from tests.support.paths import ROOT
from tests.support.refusals import refusal
from tests.support.shipped import schema_of

BOTTLENECKS = ("houlsby", "pfeiffer", "adapterdrop", "series", "parallel")
WITH_ADAPTERS = ("adalora", "lora", "lora_fa", "dora", "adadora", "vera", "dvora", "hydra", "dylora", "relora")
ALL = (*WITH_ADAPTERS, *BOTTLENECKS, "prefix", "low_rank", "galore", "bitfit", "head", "full")
WITH_TARGETS = (*WITH_ADAPTERS, "low_rank", "galore")
WITH_ALPHA = ("adalora", "lora", "lora_fa", "dora", "adadora", "dylora", "relora")
WITH_MODULES = (*WITH_ADAPTERS, *BOTTLENECKS, "prefix", "bitfit", "head")
DEMOS = sorted((ROOT / "recipes" / "configs").glob("*_demo.yaml"))


def glue(*words: str, table: Path | None = None) -> GlueConfig:
    return parse_config(GlueConfig, list(words), table=table)


def have(names: tuple[str, ...]) -> str:
    """As messages list the methods that have a setting."""
    *others, last = names
    return f"({', '.join(others)} and {last} have)"


def line_of(capsys: pytest.CaptureFixture[str], *words: str, table: Path | None = None) -> str:
    """The one line with which these arguments are refused."""
    with pytest.raises(SystemExit) as stopped:
        glue(*words, table=table)
    output = capsys.readouterr()
    assert stopped.value.code == 2 and output.out == ""
    [line] = output.err.splitlines()
    return line


# ------------------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("name", METHODS)
def test_a_line_of_the_table_is_a_method(name: str) -> None:
    config = METHODS[name]
    assert method_config(name) == config() and config().method == name
    assert config.__doc__ and config.formats <= {*EXPORT_FORMATS}
    with pytest.raises(UserError, match="method"):
        config(method="another")


def test_settings_of_one_name_are_of_one_kind() -> None:
    """So that a flag takes the same words whatever the method."""
    kinds: dict[str, Any] = {}
    for config in METHODS.values():
        for name, info in config.model_fields.items():
            assert name == "method" or kinds.setdefault(name, info.annotation) == info.annotation, name
            assert name not in METHODS  # a file has settings beside names of methods


def test_who_has_which_settings() -> None:
    own = {name: set(config.model_fields) - {"method"} for name, config in METHODS.items()}
    assert own["full"] == set() and own["head"] == {"train_modules"}
    assert own["lora"] == {
        "train_modules",
        "budget",
        "init_rank",
        "alpha",
        "rslora",
        "lora_plus_ratio",
        "targets",
        "dropout",
        "init_from",
    }
    assert own["lora"] < own["adalora"] and len(own["adalora"]) > 20
    assert FullConfig().train_modules == ()


def test_common_settings_are_shared_out_and_mistakes_are_not_lost() -> None:
    common = {"init_rank": 3, "target_rank": 2, "alpa": 1}
    assert settings_of("lora", common) == {"init_rank": 3, "alpa": 1}
    assert settings_of("head", common) == {"alpa": 1}


# ----------------------------------------------------------------------------------------------------------- one chosen


@pytest.mark.parametrize("name", METHODS)
def test_a_run_holds_writes_and_reads_the_section_of_its_method(name: str, tmp_path: Path) -> None:
    run = glue("--method", name)
    assert type(run.adapter) is METHODS[name]
    content = run.model_dump(mode="json")
    assert set(content["adapter"]) == set(METHODS[name].model_fields)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(content))
    assert glue("--config", str(file)) == run == GlueConfig.model_validate(content)


def test_a_recipes_own_defaults_are_for_the_methods_that_have_them() -> None:
    for name in ("adalora", "lora", "head"):
        assert glue("--method", name).adapter.train_modules == ("task-head",)
    assert glue("--method", "full").adapter == FullConfig()
    assert parse_config(CommonsenseConfig, ["--method", "head"]).adapter == HeadConfig()


def test_a_file_chooses_the_method_and_a_flag_another(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("adapter:\n  method: lora\n  init_rank: 3\n")
    assert glue("--config", str(file)).adapter == LoraConfig(init_rank=3, train_modules=("task-head",))
    chosen = glue("--method", "adalora", "--target-rank", "2", "--config", str(file)).adapter
    assert chosen == AdaLoraConfig(init_rank=3, target_rank=2, train_modules=("task-head",))


BY_METHOD = """
adapter:
  alpha: 3
  adalora:
    init_rank: 6
    target_rank: 4
  lora:
    init_rank: 4
    alpha: 2
  full:
"""


def test_what_a_file_sets_under_a_methods_name_is_read_by_that_method_alone(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(BY_METHOD)
    adalora: Any = glue("--config", str(file)).adapter
    assert (adalora.init_rank, adalora.target_rank, adalora.alpha) == (6, 4, 3)
    lora: Any = glue("--config", str(file), "--method", "lora").adapter
    assert (lora.init_rank, lora.alpha) == (4, 2)  # what stands deeper wins
    lora = glue("--config", str(file), "--method", "lora", "--init-rank", "5").adapter
    assert lora.init_rank == 5


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("demo", DEMOS, ids=lambda path: path.stem)
def test_demonstrations_are_for_every_method(demo: Path, name: str) -> None:
    run = parse_config(schema_of(demo), ["--config", str(demo), "--method", name])
    assert type(run.adapter) is METHODS[name]


# --------------------------------------------------------------------------------------------------------- the refusals

FLAGS = {
    "--method lora --target-rank 1": "--target-rank 1: method lora has no target_rank (adalora and adadora have): "
    "leave it out, or set method to one that has",
    "--method lora --expert-scores per_token": "--expert-scores per_token: method lora has no expert_scores (adalora "
    "has): leave it out, or set method to adalora",
    "--orthogonality 9 --method lora": "--orthogonality 9: method lora has no orthogonality (adalora and adadora have)",
    "--method lora --target-rank 1 --importance magnitude": "target_rank (adalora and adadora have): leave it out, or "
    "set method to one that has (and 1 more)",
    "--method lora --no-compact": "--compact false: method lora has no compact (adalora and adadora have)",
    "--method full --targets no_such_module": f"--targets no_such_module: method full has no targets "
    f"{have(WITH_TARGETS)}: leave it out, or set method to one that has",
    "--method full --train-modules a": f"method full has no train_modules {have(WITH_MODULES)}",
    "--method head --alpha 3": f"--alpha 3: method head has no alpha {have(WITH_ALPHA)}",
    "--method lorra": f"--method lorra: must be one of {', '.join(ALL)}; did you mean lora?",
    "--method": f"--method has no value: give it one of {', '.join(ALL)}",
    "--method head --train-modules none": "method head with no train_modules",
    "--method full --export-formats peft": "export_formats peft with method full: it cannot be written so (adalora, "
    "lora, lora_fa, dora, adadora, vera, prefix can be)",
}


@pytest.mark.parametrize("words", FLAGS)
def test_flags(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert FLAGS[words] in line_of(capsys, *words.split())


FILES = [
    (
        "  method: lora\n  target_rank: 8\n",
        "",
        ":3: adapter.target_rank: 8: method lora has no target_rank (adalora and adadora have",
    ),
    (
        "  target_rank: 8\n",
        "--method lora",
        "set method to one that has (or put it under adapter.adalora, which adalora alone",
    ),
    ("  target_rank: null\n", "--method head", ":2: adapter.target_rank: null: method head has no target_rank"),
    (
        "  method: full\n",
        "--alpha 3",
        f"--alpha 3: method full has no alpha {have(WITH_ALPHA)}: leave it out, or set",
    ),
    (
        "  method: lorra\n",
        "",
        f":2: adapter.method: lorra: must be one of {', '.join(ALL)}; did you mean lora?",
    ),
    ("  method: [lora]\n", "", ":2: adapter.method: ['lora']: must be one of adalora"),
    ("  method: null\n", "", ":2: adapter.method: null: must be one of adalora"),
    ("  method: true\n", "", ":2: adapter.method: true: must be one of adalora"),
    (
        "  lora: {target_rank: 3}\n",
        "",
        ":2: adapter.lora.target_rank: method lora has no target_rank (adalora and adadora have): leave it out, or put "
        "it under ada",
    ),
    ("  lora:\n    alpa: 3\n", "", ":3: alpa is not a setting of adapter.lora: did you mean adapter.lora.alpha?"),
    ("  lora:\n    method: full\n", "", ":3: method is not a setting of adapter.lora"),
    (
        "  full: {alpha: 3}\n",
        "",
        f":2: adapter.full.alpha: method full has no alpha {have(WITH_ALPHA)}: leave it out",
    ),
    ("  lora: 3\n", "", ":2: section adapter.lora must be a mapping, not 3"),
    ("  lora: {init_rank: true}\n", "", ":2: adapter.lora.init_rank: true: must be an integer >= 1"),
    ("  lora:\n    alpha: 0\n", "--method lora", ":3: adapter.lora.alpha: 0: must be a number > 0"),
    ("  full: {zeta: 3}\n", "", ":2: zeta is not a setting of adapter.full: it has none"),
    ("  nora: {alpha: 0}\n", "", ":2: nora is not a setting of adapter"),
]


@pytest.mark.parametrize(("text", "words", "said"), FILES)
def test_files(text: str, words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"adapter:\n{text}")
    line = line_of(capsys, "--config", str(file), *words.split())
    assert said in line and (words.startswith("--alpha") or str(file) in line)


TABLE = """
preset: {paper: {}}
adapter: {alpha: 2, orthogonality: 0.3}
method:
  adalora: {adapter: {init_rank: 4, target_rank: 2}}
  lora: {}
  head: {}
  full: {}
"""


def test_a_table_is_for_all_methods_and_what_a_user_adds_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "small.yaml"
    table.write_text(TABLE)
    preset = ("--preset", "paper", "--method")
    assert glue(*preset, "lora", table=table).adapter == LoraConfig(alpha=2, train_modules=("task-head",))
    assert glue(*preset, "head", table=table).adapter == HeadConfig()
    assert glue(*preset, "full", table=table).adapter == FullConfig()
    adalora: Any = glue(*preset, "adalora", table=table).adapter
    assert (adalora.alpha, adalora.orthogonality, adalora.target_rank) == (2, 0.3, 2)
    line = line_of(capsys, *preset, "lora", "--orthogonality", "0.3", table=table)
    assert "--orthogonality 0.3: method lora has no orthogonality" in line
    file = tmp_path / "own.yaml"
    file.write_text("adapter: {method: head, alpha: 3}\n")
    line = line_of(capsys, *preset[:2], "--config", str(file), table=table)
    assert f"{file}:1: adapter.alpha: 3: method head has no alpha" in line
    table.write_text(TABLE.replace("orthogonality", "ortogonality"))
    assert "adapter.ortogonality: 0.3: no method has such a setting" in line_of(capsys, *preset, "lora", table=table)


def test_python() -> None:
    with pytest.raises(UserError, match=r"^target_rank=3: method lora has no target_rank \(adalora and adadora have"):
        LoraConfig(target_rank=3)
    with pytest.raises(UserError, match=re.escape(f"method full has no train_modules {have(WITH_MODULES)}")):
        method_config("full", train_modules=("a",))
    with pytest.raises(UserError, match="^alpha=1: method head has no alpha"):
        RunConfig(adapter={"method": "head", "alpha": 1})
    with pytest.raises(UserError, match=r"^LoraConfig has no alpa: did you mean alpha\?$"):
        LoraConfig(alpa=3)
    with pytest.raises(UserError, match=", ".join(ALL)):
        method_config("lorra")
    assert RunConfig(adapter={"method": "lora", "alpha": 3}).adapter == LoraConfig(alpha=3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 8}, "AdaLoraConfig has no r: here: init_rank"),
        ({"lora_alpha": 8, "target_modules": ["q"]}, "AdaLoraConfig has no lora_alpha: here: alpha (and 1 more)"),
        ({"zzz": 8}, "AdaLoraConfig has no zzz: help(AdaLoraConfig) lists all"),
        ({"init_rank": -1}, "init_rank=-1: must be an integer >= 1; leave it out for the default, 12"),
        ({"alpha": float("nan")}, "alpha=nan: must be finite, a number > 0; leave it out for the default, 16.0"),
        ({"start": "papr"}, "start='papr': must be one of matched, paper; did you mean paper?"),
        ({"targets": ("a", "a")}, "targets lists a more than once: remove the repetition"),
        ({"init": "gaussian"}, "init gaussian with start matched"),
    ],
)
def test_a_mistake_in_python_is_one_line(settings: dict[str, Any], said: str) -> None:
    assert refusal(lambda: AdaLoraConfig(**settings)).startswith(said)
    refusal(lambda: RunConfig(adapter=settings))


PICKLES_AS_PEFT = {
    "model": ModelConfig(allow_pickle_weights=True),
    "export": ExportConfig(export_formats=("peft",)),
}


@pytest.mark.parametrize(
    ("adapter", "others", "said"),
    [
        (AdaLoraConfig(init_rank=4), {}, "target_rank 8 with init_rank 4"),
        (AdaLoraConfig(target_budget=0), {}, "target_budget 0 with no train_modules"),
        (AdaLoraConfig(final_steps=3), {"train": TrainConfig(max_steps=3)}, "no step is left in which to prune"),
        (HeadConfig(train_modules=()), {}, "method head with no train_modules"),
        (FullConfig(), {"model": ModelConfig(dtype="float16")}, "method full with dtype float16"),
        (DoraConfig(), {"quantization": QuantizationConfig(quantization="int8")}, "int8 with method dora"),
        (DoraConfig(), {"export": ExportConfig(export_formats=("lora",))}, "export_formats lora with method dora"),
        (DoraConfig(), PICKLES_AS_PEFT, "allow_pickle_weights true with export_formats peft"),
        (BitFitConfig(), {"model": ModelConfig(dtype="bfloat16")}, "method bitfit with dtype bfloat16"),
        (BitFitConfig(), {"quantization": QuantizationConfig(quantization="nf4")}, "nf4 with method bitfit"),
        (BitFitConfig(), {"export": ExportConfig(export_formats=("peft",))}, "export_formats peft with method bitfit"),
        (FullConfig(), {"quantization": QuantizationConfig(quantization="nf4")}, "quantization nf4 with method full"),
        (HeadConfig(), {"export": ExportConfig(export_formats=("lora",))}, "export_formats lora with method head"),
    ],
)
def test_rules_over_the_rest_of_a_run(adapter: MethodConfig, others: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        RunConfig(adapter=adapter, **others)
    if others:
        RunConfig(adapter=LoraConfig(), **others)  # not a rule of this one


# ----------------------------------------------------------------------------------------------------------------- help


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        glue(*words, "--help")
    assert stopped.value.code == 0
    return _joined(capsys.readouterr().out)


def _joined(shown: str) -> str:
    """A list of words that is broken over lines of the box, in one."""
    return re.sub(r",[ │]*\n[ │]*", ",", shown)


def test_help_is_about_the_method_that_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("adapter: {method: lora}\n")
    assert "--target-rank" in help_of(capsys) and "--target-rank" in help_of(capsys, "--method", "lorra")
    for words in (["--method", "lora"], ["--method=lora"], ["--config", str(file)], ["--alpa", "--method", "lora"]):
        shown = help_of(capsys, *words)
        assert "--init-rank" in shown and "--target-rank" not in shown
        assert f"{{{','.join(ALL)}}}" in shown.translate(str.maketrans("", "", " │\n"))  # however lines are broken
    assert "--init-rank" not in help_of(capsys, "--method", "head", "--config", str(file))
    assert "--target-rank" in help_of(capsys, "--config", str(tmp_path / "none.yaml"))
