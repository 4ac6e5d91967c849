"""The command line as users meet it: what is read, and the one line that every mistake is answered with."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from adalora_dist.config.flags import fail, parse_config, user_errors
from adalora_dist.config.methods import METHODS, AdaLoraConfig
from adalora_dist.config.sections import RunConfig, TrainConfig
from adalora_dist.config.settings import settings_by_flag
from adalora_dist.io.errors import UserError
from adalora_dist.tasks.commonsense.config import COMMONSENSE_TASKS, CommonsenseConfig
from adalora_dist.tasks.e2e.config import E2EConfig
from adalora_dist.tasks.glue.config import GlueConfig
from adalora_dist.tasks.pretrain.config import PretrainConfig
from adalora_dist.tasks.sft.config import SftConfig
from adalora_dist.tasks.squad.config import SquadConfig
from adalora_dist.tasks.summarization.config import SummarizationConfig
from tests.support.limits import HANG_SECONDS
from tests.support.paths import ROOT

CONFIG_FILES = sorted((ROOT / "recipes" / "configs").glob("llama_commonsense*.yaml"))
ONE_RUN = """
from adalora_dist.config.flags import parse_config
from adalora_dist.tasks.commonsense.config import CommonsenseConfig
"""


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def parse(*arguments: str) -> CommonsenseConfig:
    return parse_config(CommonsenseConfig, list(arguments))


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error with which these arguments are refused."""
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    output = capsys.readouterr()
    assert stopped.value.code == 2
    assert output.out == ""
    lines = output.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), output.err
    return lines[0]


def run_python(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


# ------------------------------------------------------------------------------------------------- what is accepted


def test_no_arguments_give_the_defaults() -> None:
    assert parse() == CommonsenseConfig()


def test_flags_reach_their_sections() -> None:
    run = parse(
        *("--model", "gpt2", "--data=hub", "--alpha", "8", "--max-steps", "7", "--overwrite", "--no-verify-export"),
        *("--tasks", "boolq", "piqa", "--targets", "q_proj", "v_proj", "--learning_rate=1e-3"),
        *("--export-formats", "merged", "lora"),
    )
    assert run.export.export_formats == ("merged", "lora")
    assert (run.model.name, run.data.source, run.adapter.alpha, run.train.max_steps) == ("gpt2", "hub", 8.0, 7)
    assert (run.train.overwrite, run.export.verify_export, run.train.learning_rate) == (True, False, 1e-3)
    assert run.data.tasks == ("boolq", "piqa")
    assert run.adapter.targets == ("q_proj", "v_proj")


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("adapter: {alpha: 4, init_rank: 9}\ntrain:\n  learning_rate: 5e-4\n  trackers: [wandb]\nexport:\n")
    run = parse("--alpha", "5", "--config", str(file), "--trackers", "none", "--max-steps", "none")
    assert (run.adapter.alpha, run.adapter.init_rank, run.adapter.target_rank) == (5.0, 9, 8.0)
    assert run.train.learning_rate == 5e-4  # YAML 1.1 reads 5e-4, without a point, as text
    assert run.train.trackers == () and run.train.max_steps is None


def test_on_and_off_are_words_in_a_file_too(tmp_path: Path) -> None:
    for word, packing in (("on", "off"), ("off", "on"), ("auto", "'on'")):
        (tmp_path / "a.yaml").write_text(f"train:\n  async_checkpoints: {word}\n  packing: {packing}\n")
        train = parse("--config", str(tmp_path / "a.yaml")).train
        assert (train.async_checkpoints, train.packing) == (word, packing.strip("'"))


def test_last_of_a_repeated_flag_counts() -> None:
    assert parse("--seed", "1", "--seed", "2").train.seed == 2


@pytest.mark.parametrize("rank", [["--local_rank=1"], ["--local-rank", "1"], ["--local_rank", "1"]])
def test_launchers_rank_flag_is_ignored(rank: list[str]) -> None:
    assert parse(*rank, "--seed", "3") == parse("--seed", "3")


def test_presets_of_a_recipes_schema_survive_other_settings_of_the_section() -> None:
    class Preset(RunConfig):
        train: TrainConfig = TrainConfig(learning_rate=1e-3, seed=1)

    run = parse_config(Preset, ["--seed", "5"])
    assert (run.train.learning_rate, run.train.seed) == (1e-3, 5)


def test_two_settings_with_one_flag_are_refused() -> None:
    class Clash(RunConfig):
        second: AdaLoraConfig = AdaLoraConfig()

    with pytest.raises(TypeError, match="two settings are called --method"):
        parse_config(Clash, [])


def test_method_lora_reads_no_budget() -> None:
    run = parse("--method", "lora", "--init-rank", "4", "--max-steps", "1")
    assert run.adapter.init_rank == 4


@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda path: path.stem)
def test_shipped_configuration(file: Path) -> None:
    run = parse("--config", str(file))
    if file.stem.endswith("demo"):
        assert not run.model.name and not run.data.source  # both built in
    else:
        assert run.model.name and run.data.source == "hub"
        assert run.adapter.init_rank == 1.5 * run.adapter.target_rank
    header = "".join(line for line in file.open() if line.startswith("#"))
    assert f"--config recipes/configs/{file.name}" in header
    for word in ("Hardware:", "Time:", "Result:"):
        assert word in header
    # The variants in the header are commands, too: their flags must parse on top of the file.
    variants = re.findall(r"#.* (--(?:method|init-rank) .*)", header)
    assert variants
    for variant in variants:
        parse("--config", str(file), *shlex.split(variant, comments=True))


def test_there_are_configurations_to_test() -> None:
    assert len(CONFIG_FILES) >= 4, f"no YAML files found in {ROOT / 'recipes' / 'configs'}"


# -------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("method", METHODS)
def test_help_names_every_flag_and_imports_no_torch(method: str) -> None:
    program = ONE_RUN + (
        "import sys\n"
        "try:\n    parse_config(CommonsenseConfig, description='Teaches a model.')\n"
        "finally:\n    print('torch loaded:', 'torch' in sys.modules)\n"
    )
    done = run_python(program, *([] if method == "adalora" else ["--method", method]), "--help-all")
    assert done.returncode == 0 and done.stderr == ""
    assert "torch loaded: False" in done.stdout
    assert "Teaches a model." in done.stdout and "adapter options" in done.stdout
    shown = {flag.removeprefix("no-") for flag in re.findall(r"--([a-z0-9-]+)", done.stdout)}
    assert shown == {*settings_by_flag(CommonsenseConfig, method), "config", "help"}
    words = " ".join(re.sub("[│╭╮╰╯─]", " ", done.stdout).split())
    assert all(f"{name}: " in words for name in METHODS)  # what the others are


# ------------------------------------------------------------------------------------------------- what is refused

BAD_FLAGS = [
    ("--alpa 3", ["--alpa is not a flag", "did you mean --alpha?"]),
    ("--lr 1e-3", ["--lr is not a flag", "--learning-rate"]),
    ("--adapter.alpha 3", ["--adapter.alpha is not a flag", "--alpha"]),
    ("-x", ["-x is not a flag", "--help"]),
    ("--no-overwrit", ["--no-overwrit is not a flag", "--no-overwrite"]),
    ("--no-alpha", ["--no-alpha is not a flag", "--alpha"]),
    ("--no-overwrite=yes", ["--no-overwrite takes no value"]),
    ("5 --seed 1", ["'5' stands before any flag"]),
    ("--epochs abc", ["--epochs abc: must be a number > 0", "default, 3.0"]),
    ("--alpha -1", ["--alpha -1: must be a number > 0", "default, 16.0"]),
    ("--alpha inf", ["--alpha inf: must be finite, a number > 0"]),
    ("--init-rank 2.5", ["--init-rank 2.5: must be an integer >= 1"]),
    ("--max-steps 0", ["--max-steps 0: must be an integer >= 1, or none"]),
    ("--dropout 1", ["--dropout 1: must be a number >= 0 and < 1"]),
    ("--lr-end-ratio 1.5", ["--lr-end-ratio 1.5: must be a number >= 0 and <= 1"]),
    ("--seed -1", ["--seed -1: must be an integer >= 0 and < 4294967296"]),
    ("--overwrite runs/a", ["--overwrite runs/a: must be true or false"]),
    ("--precision fp8", ["--precision fp8: must be one of fp32, bf16, fp16"]),
    ("--precision bf61", ["--precision bf61", "did you mean bf16?"]),
    ("--tasks boolq piqqa", ["piqqa is wrong", *COMMONSENSE_TASKS, "did you mean piqa?"]),
    ("--tasks boolq boolq", ["tasks lists boolq more than once"]),
    ("--epochs", ["--epochs has no value", "a number > 0"]),
    ("--model=", ["--model has no value"]),
    ("--tasks", ["--tasks has no value", "boolq", "none"]),
    ("--config", ["--config has no value", "YAML file"]),
    ("--epochs 1 2", ["--epochs takes one value and got 2: 1 2"]),
    ("--local_rank=0 stray --seed 1", ["--local-rank takes one value"]),
    ("--config a.yaml --config b.yaml", ["--config is given twice"]),
    ("--config missing.yaml", ["missing.yaml", "No such file"]),
    ("--targets q_(", ["--targets q_(", "not a regular expression"]),
    ("--train-modules [", ["--train-modules [", "not a regular expression"]),
    ("--init-rank 4", ["target_rank 8", "init_rank 4", "must be <= init_rank"]),
    ("--target-rank 0", ["target_rank 0", "must be > 0"]),
    ("--lora-pad", ["lora_pad true", "export_formats merged", "add lora"]),
    ("--method full --export-formats merged lora", ["export_formats lora", "method full", "leave export_formats out"]),
    ("--method full --init-from adapter", ["--init-from adapter: method full has no init_from", "leave it out"]),
    ("--target-budget 0", ["target_budget 0", "must be > 0"]),
    ("--max-steps 9 --initial-warmup-steps 5 --final-steps 4", ["5", "4", "max_steps 9", "must be < max_steps"]),
    ("--max-steps 9 --final-steps 9", ["final_steps 9 with max_steps 9", "lower final_steps"]),
    ("--batch-size 16 --micro-batch-size 12", ["batch_size 16", "micro_batch_size 12", "micro_batch_size to 8"]),
    ("--checkpoint-activations 2", ["checkpoint_activations 2 with gradient_checkpointing false", "to true, or leave"]),
    ("--compile --gradient-checkpointing --offload-activations", ["compile true", "offload_activations True"]),
    ("--compile --gradient-checkpointing --checkpoint-activations selective", ["compile true", "leave checkpoint_"]),
    ("--compile --quantization nf4", ["compile true with quantization nf4", "quantization to none"]),
    ("--compile --quantization fp8", ["compile true with quantization fp8", "keep the expanded", "compile to false"]),
    ("--quant-storage bfloat16 --quantization fp8", ["quant_storage bfloat16 with quantization fp8", "leave quant_st"]),
    ("--no-double-quant", ["double_quant false with quantization none", "4-bit", "leave double_quant out"]),
    ("--quant-storage uint8 --quantization int8", ["quant_storage uint8 with quantization int8", "4-bit weights"]),
    ("--importance-kernel compiled --importance magnitude", ["compiled with importance magnitude", "default, eager"]),
    ("--importance-order after --importance magnitude", ["after with importance magnitude", "default, before"]),
    ("--beta2 0.5 --importance sensitivity", ["beta2 0.5 with importance sensitivity", "set beta2 to its default"]),
    ("--lr-end-ratio 0.1 --lr-schedule constant", ["lr_end_ratio 0.1 with lr_schedule constant", "default, 0.0"]),
    ("--push-public", ["push_public true without push_to_hub", "to its default, false"]),
    ("--push-revision next", ["push_revision next without push_to_hub", "to its default, main"]),
    ("--evaluate-by likelihood --merge-to-generate", ["merge_to_generate true with evaluate_by likelihood", "leave"]),
    ("--evaluate-by likelihood --max-new-tokens 9", ["max_new_tokens 9 with evaluate_by likelihood", "add generation"]),
    ("--merge-to-generate --method adadora", ["merge_to_generate true with method adadora", "method to adalora"]),
    ("--merge-to-generate --quantization int8", ["merge_to_generate true with quantization int8", "to none"]),
    ("--compile --method dora", ["compile true with method dora", "method to adalora"]),
    ("--gradient-checkpointing --checkpoint-activations 1", ["--checkpoint-activations 1"]),
    ("--micro-batch-tokens -1", ["--micro-batch-tokens -1", "must be an integer >= 0"]),
    ("--async-checkpoints maybe", ["--async-checkpoints maybe", "auto", "on", "off"]),
    ("--trust-remote-code --model a/b", ["trust_remote_code", "revision None", "40 hexadecimal"]),
    ("--trust-remote-code --model a/b --revision main", ["trust_remote_code", "revision main", "40 hexadecimal"]),
    ("--alpha 0 --epochs 0 --seed x", ["--alpha 0: must be a number > 0", "(and 2 more)"]),
]

BAD_FILES = [
    ("adapter:\n  alpa: 3\n", [":2: alpa is not a setting of adapter", "did you mean adapter.alpha?"]),
    ("train:\n  alpha: 3\n", [":2: alpha is not a setting of train", "did you mean adapter.alpha?"]),
    ("train:\n  learning-rate: 3\n", [":2: learning-rate", "did you mean train.learning_rate?"]),
    ("alpha: 3\n", [":1: alpha is not a section", "did you mean adapter.alpha?"]),
    ("adaptor:\n  alpha: 3\n", [":1: adaptor is not a section", "did you mean adapter?"]),
    ("12: {}\n", [":1: 12 is not a section", "model, adapter, train"]),
    ("model: gpt2\n", [":1: section model must be a mapping, not 'gpt2'", "name"]),
    ("# first\nadapter:\n  alpha: -1\n", [":3: adapter.alpha: -1: must be a number > 0"]),
    ("train:\n  epochs: yes\n", [":2: train.epochs: true: must be a number > 0"]),
    ("train:\n  epochs: null\n", [":2: train.epochs: null: must be a number > 0"]),
    ("model:\n  revision: 1234567\n", [":2: model.revision: 1234567: must be text (in YAML: in quotes)"]),
    ("adapter:\n  targets: q_proj\n", [":2: adapter.targets: q_proj: must be a list of words (in YAML: [a, b])"]),
    ("data:\n  tasks: [piqqa]\n", [":2: data.tasks", "piqqa is wrong", "did you mean piqa?"]),
    ("adapter: {alpha: 1}\ntrain: {}\nadapter: {beta1: 0}\n", [":3: not valid YAML", "adapter is set twice"]),
    ("adapter:\n  alpha: 1\n  alpha: 2\n", [":3: not valid YAML", "alpha is set twice"]),
    ("adapter:\n\talpha: 1\n", [":2: not valid YAML"]),
    ("adapter: {alpha: 1\ntrain: 3\n", [":2: not valid YAML"]),
    ("? [a, b]\n: 1\n", [":1: not valid YAML"]),
    ("train: !!python/object/apply:os.getcwd []\n", [":1: not valid YAML"]),
    ("a: 1\n---\nb: 1\n", [":2: not valid YAML"]),
    ("- alpha\n", ["must be a mapping of sections"]),
    ("just words\n", ["must be a mapping of sections"]),
    ("# nothing but a comment\n", ["must be a mapping of sections"]),
    ("a: \x07\n", ["not valid YAML"]),
    ("a: " + "[" * 5000 + "\n", ["nested too deeply"]),
    ("a: 2001-99-99\n", ["not valid YAML", "month must be in 1..12"]),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD_FLAGS, ids=[flags for flags, _ in BAD_FLAGS])
def test_bad_flags(capsys: pytest.CaptureFixture[str], arguments: str, parts: list[str]) -> None:
    line = error_line(capsys, *arguments.split())
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize(("text", "parts"), BAD_FILES, ids=[repr(text) for text, _ in BAD_FILES])
def test_bad_files(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, parts: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    line = error_line(capsys, "--config", str(file))
    for part in (str(file), *parts):
        assert part in line, line


def test_unreadable_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"model: {name: \xe9}\n")
    assert "not UTF-8 text" in error_line(capsys, "--config", str(tmp_path / "latin.yaml"))
    assert "Is a directory" in error_line(capsys, "--config", str(tmp_path))


def test_mistake_in_a_file_is_forgotten_when_a_flag_replaces_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("adapter: {alpha: -1}\n")
    assert parse("--config", str(file), "--alpha", "2").adapter.alpha == 2.0


def test_a_real_process_exits_with_one_line_and_code_2() -> None:
    done = run_python(ONE_RUN + "parse_config(CommonsenseConfig)", "--alpa", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --alpa is not a flag: did you mean --alpha?\n"


def test_pinned_commit_allows_remote_code() -> None:
    assert parse("--trust-remote-code", "--model", "a/b", "--revision", "0" * 40).model.trust_remote_code


# --------------------------------------------------------------------------------------------------- user_errors


def test_user_errors_wraps_a_main(capsys: pytest.CaptureFixture[str]) -> None:
    @user_errors()
    def main() -> NoReturn:
        raise UserError("seed=-1:\nmust be >= 0")

    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: seed=-1: must be >= 0\n"


def test_other_errors_propagate() -> None:
    with pytest.raises(ZeroDivisionError), user_errors():
        _ = 1 / 0
    with pytest.raises(ValueError, match="not a user's"), user_errors():
        raise ValueError("not a user's")


@pytest.mark.parametrize(("environment", "rank"), [({"RANK": "3", "LOCAL_RANK": "0"}, "3"), ({"LOCAL_RANK": "1"}, "1")])
def test_other_ranks_let_rank_0_speak_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], rank: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    printed_before_the_wait = []
    monkeypatch.setattr(time, "sleep", lambda seconds: printed_before_the_wait.append(capsys.readouterr().err))
    with pytest.raises(SystemExit) as stopped:
        fail("no such file")
    assert stopped.value.code == 2
    assert printed_before_the_wait == [""]
    assert capsys.readouterr().err == f"error: rank {rank}: no such file\n"


def test_rank_0_does_not_wait(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("rank 0 waited"))
    with pytest.raises(SystemExit):
        fail("no such file")
    assert capsys.readouterr().err == "error: no such file\n"


@pytest.mark.parametrize("config", [CommonsenseConfig, E2EConfig, SummarizationConfig])
def test_samples_that_nothing_would_show_are_refused(config: type[RunConfig], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit), user_errors():
        parse_config(config, ["--show-samples", "2"])
    assert "show_samples 2 with eval_every 0: nothing is generated while training" in capsys.readouterr().err
    parse_config(config, ["--show-samples", "2", "--eval-every", "5"])


def test_samples_of_replies_that_are_not_generated_are_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit), user_errors():
        parse("--show-samples", "2", "--eval-every", "5", "--evaluate-by", "likelihood")
    assert "show_samples 2 with evaluate_by likelihood: no reply is generated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "flags", "says"),
    [
        (GlueConfig, "--logits-chunk 7", "logits_chunk 7: the task's head has no logits of words"),
        (SquadConfig, "--logits-chunk 7", "logits_chunk 7: the task's head has no logits of words"),
        (SftConfig, "--show-samples 0 --merge-to-generate", "merge_to_generate true with show_samples 0 and no answer"),
        (SftConfig, "--length-penalty 2", "length_penalty 2.0 with num_beams 1: one beam is compared with no other"),
        (SftConfig, "--answer-tokens 9", "answer_tokens 9 without answer"),
        (SquadConfig, "--null-threshold 1", "null_threshold 1.0 with task v1.1: every question has an answer"),
        (PretrainConfig, "--lr-schedule constant --lr-end-ratio 0.2", "to its default, 0.1"),
    ],
)
def test_what_a_recipe_has_no_use_for_is_refused(
    config: type[RunConfig], flags: str, says: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit), user_errors():
        parse_config(config, flags.split())
    assert says in capsys.readouterr().err


def test_what_recipes_have_a_use_for_is_read() -> None:
    parse_config(GlueConfig, ["--logits-chunk", "0"])
    parse_config(SftConfig, ["--show-samples", "0", "--merge-to-generate", "--answer", "questions.jsonl"])
    parse("--quantization", "nf4", "--no-double-quant", "--quant-storage", "uint8")
    parse("--importance", "sensitivity", "--beta1", "0.5", "--importance-order", "after")
    parse("--checkpoint-every", "0", "--async-checkpoints", "on", "--keep-checkpoints", "3")
    parse("--orthogonality", "0", "--orthogonality-form", "norm")
    parse_config(PretrainConfig, ["--lr-schedule", "constant"])
    parse_config(SquadConfig, ["--null-threshold", "1", "--task", "v2.0"])
    parse_config(SftConfig, ["--show-samples", "0", "--answer", "questions.jsonl", "--answer-tokens", "9"])
    parse_config(SftConfig, ["--show-samples", "0", "--max-new-tokens", "9", "--num-beams", "2"])
    parse_config(E2EConfig, ["--length-penalty", "2", "--num-beams", "1"])
