"""The one screen of --help, and names that other programs have for what is a flag here."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adalora_dist.config import foreign_names
from adalora_dist.config.flags import parse_config
from adalora_dist.config.foreign_names import flag_here
from adalora_dist.config.help import TOPICS
from adalora_dist.config.sections import RunConfig
from adalora_dist.config.settings import settings_by_flag
from adalora_dist.tasks.glue.config import GlueConfig
from adalora_dist.tasks.sft.config import SftConfig
from tests.support.limits import HANG_SECONDS
from tests.support.paths import ROOT
from tests.support.shipped import SCHEMAS, TABLES, schema_of

ABOUT = "Teaches a model.\n\n    and how"


def shown(capsys: pytest.CaptureFixture[str], schema: type[RunConfig], *words: str, table: Path | None = None) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse_config(schema, [*words, "--help"], ABOUT, table)
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", SCHEMAS)
def test_it_is_one_screen_with_every_flag(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    schema = SCHEMAS[recipe]
    tables = [path for path in TABLES if schema_of(path) is schema]
    text = shown(capsys, schema, table=tables[0] if tables else None)
    assert len(text.splitlines()) <= 52 and "Teaches a model." in text and "and how" not in text
    flags = {flag for flag in re.findall(r"(?<![\w-])--([a-z0-9-]+)", text)}
    method = schema.model_fields["adapter"].get_default(call_default_factory=True).method
    assert flags >= {*settings_by_flag(schema, method), "config", "help-all"}
    assert ("--preset" in text) == bool(tables)
    order = [text.index(f"\n{title}") for title in TOPICS]
    assert order == sorted(order)  # data first


def test_every_section_has_its_topic() -> None:
    sections = {section for topic in TOPICS.values() for section in topic.sections}
    assert sections == set(SftConfig.model_fields)
    flags = {flag for schema in SCHEMAS.values() for flag in settings_by_flag(schema)}
    assert {flag for topic in TOPICS.values() for flag in topic.first} <= flags


def test_it_says_what_a_setting_takes_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, SftConfig)
    assert re.search(r"--epochs NUMBER +Passes over the training data \[3\.0\]", text)
    assert re.search(r"--precision \{fp32,bf16,fp16,auto\}", text)
    assert re.search(r"--data WORD \.\.\. +Files \(", text)


def test_who_looks_at_the_beginning_alone_gets_no_traceback() -> None:
    for words in ("recipes/llama_sft.py --help", "recipes/llama_sft.py --help-all", "-m adalora_dist ls"):
        program = subprocess.Popen(
            [sys.executable, *words.split()], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert isinstance(program.stdout, io.TextIOWrapper) and program.stderr is not None
        program.stdout.close()
        assert program.stderr.read() == "" and program.wait(HANG_SECONDS) == 0
        program.stderr.close()


FOREIGN = {
    "lora_r": "--init-rank", "init_r": "--init-rank", "lora_alpha": "--alpha", "cutoff_len": "--max-length",
    "sequence_len": "--max-length", "deltaT": "--mask-interval-steps", "tinit": "--initial-warmup-steps",
    "base_model": "--model", "model_name_or_path": "--model", "num_train_epochs": "--epochs",
    "use_dora": "--method dora",
    "load_in_4bit": "--quantization", "lora_target_modules": "--targets", "report_to": "--trackers",
    "per_device_train_batch_size": "--micro-batch-size", "orth_reg_weight": "--orthogonality",
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_names_of_others(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for typed in (f"--{name}", f"--{name.replace('_', '-')}"):
        with pytest.raises(SystemExit) as stopped:
            parse_config(SftConfig, [typed, "3"])
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"error: {typed} is not a flag: here: {FOREIGN[name]}\n"
    flag, _, value = FOREIGN[name].removeprefix("--").partition(" ")
    section, own, _ = settings_by_flag(SftConfig)[flag]
    for text in (f"{name}: 3\n", f"train:\n  {name}: 3\n"):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(SystemExit):
            parse_config(SftConfig, ["--config", str(tmp_path / "run.yaml")])
        assert f"here: {section}.{own}" + (f": {value}" if value else "") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "options", "says"),
    [
        ("--engin", "engine processes", "did you mean --engine?"),
        ("--gpu", "gpus nodes", "did you mean --gpus?"),
        ("--num_processes", "engine processes", "here: --processes"),
        ("--num_machines", "processes nodes", "here: --nodes"),
        ("-n", "gpus nodes", "here: --gpus"),
        ("--gpus", "engine processes", "here: --processes"),
        ("--num_processes", "", "see --help for all of them"),
        ("--typo", "engine processes", "did you mean --dtype?"),
    ],
)
def test_options_of_the_command_before_are_hinted_at(
    typed: str, options: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that ``adalora-dist run`` or ``plan`` has started knows what those take."""
    monkeypatch.setenv("ADALORA_DIST_OPTIONS", options)
    with pytest.raises(SystemExit):
        parse_config(SftConfig, [typed, "3"])
    assert capsys.readouterr().err == f"error: {typed} is not a flag: {says}\n"


def test_no_name_of_others_is_one_of_ours_and_all_lead_somewhere() -> None:
    own = {flag for schema in SCHEMAS.values() for flag in settings_by_flag(schema)}
    assert not set(foreign_names._SPELT) & own - {"beta1", "beta2"}
    assert set(foreign_names._SPELT.values()) <= own
    assert flag_here("cutoff_len", settings_by_flag(GlueConfig)) == "--max-length"
    assert flag_here("train_on_inputs", settings_by_flag(GlueConfig)) == "" == flag_here("nothing", ["alpha"])
