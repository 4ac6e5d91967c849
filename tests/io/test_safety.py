"""One run per folder; corrupt rows; secrets; and files that would run code if they were unpickled."""

from __future__ import annotations

import json
import os
import pickle
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adalora_dist.backbones.load import load_backbone, load_tokenizer, refuse_code_from_elsewhere
from adalora_dist.config.sections import ModelConfig, RunConfig, TrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.io.redaction import redacted, redacted_command
from adalora_dist.tasks.commonsense.config import CommonsenseConfig, CommonsenseDataConfig
from adalora_dist.tasks.commonsense.rows import load_tasks
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.training.faults.memory import cheapest_changes
from adalora_dist.training.faults.run_lock import RunLock
from adalora_dist.training.run_folder import RunFolder
from tests.support.faulty_runs import Ranks
from tests.support.refusals import refusal
from tests.support.tiny_project import RECIPE, Project, write_data

# ------------------------------------------------------------------------------------------------------------- the lock


def test_a_second_run_in_a_folder_is_refused_and_told_the_owner(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run")
    with pytest.raises(UserError, match=rf"in use by the run of process {os.getpid()} on .* since 20"):
        RunLock(tmp_path / "run")
    RunLock(tmp_path / "other").release()
    lock.release()
    RunLock(tmp_path / "run").release()


@pytest.mark.parametrize("way", ["exit", "kill"])
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path, way: str) -> None:
    pid = os.fork()
    if pid == 0:
        RunLock(tmp_path)
        if way == "kill":
            os.kill(os.getpid(), 9)
        os._exit(0)
    os.waitpid(pid, 0)
    assert json.loads((tmp_path / ".lock-owner").read_text())["pid"] == pid
    lock = RunLock(tmp_path)
    assert json.loads((tmp_path / ".lock-owner").read_text())["pid"] == os.getpid()
    lock.release()


def test_overwriting_a_run_keeps_the_lock_on_its_folder(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    config = CommonsenseConfig(train=TrainConfig(output_dir=str(tmp_path), overwrite=True))
    RunFolder(config, True, {})
    (tmp_path / "merged").mkdir()
    RunFolder(config, True, {})
    with pytest.raises(UserError, match="in use"):
        RunLock(tmp_path)
    assert not (tmp_path / "merged").exists()
    lock.release()


# ------------------------------------------------------------------------------------------------------- corrupt rows

BROKEN = {
    "not JSON": ('{"instruction": ', "not valid JSON"),
    "not UTF-8": (b'{"instruction": "\xff"}', "not UTF-8"),
    "not an object": ("[1]", "the row is a list"),
    "field missing": ('{"instruction": "Is it?", "input": "", "output": "true"}', "field answer is missing"),
    "field of another type": (
        '{"instruction": 3, "input": "", "output": "true", "answer": "true"}',
        "field instruction is 3",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_corrupt_row_is_an_error_or_left_out_and_counted(tmp_path: Path, broken: str) -> None:
    row, reason = BROKEN[broken]
    write_data(tmp_path)
    file = tmp_path / "boolq" / "train.jsonl"
    whole, _ = load_tasks(CommonsenseDataConfig(source=str(tmp_path)))
    lines = file.read_bytes().splitlines()
    for number in (3, 7):
        lines[number - 1] = row if isinstance(row, bytes) else row.encode()
    file.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(UserError, match=rf"boolq/train.jsonl:3: .*{reason}"):
        load_tasks(CommonsenseDataConfig(source=str(tmp_path)))
    bad = BadRows("skip")
    rest, _ = load_tasks(CommonsenseDataConfig(source=str(tmp_path), bad_rows="skip"), bad)
    assert [(e.instruction, e.answer) for e in rest] == [
        (e.instruction, e.answer) for k, e in enumerate(whole) if k not in (2, 6)
    ]
    assert bad.counts == {str(file): 2} and "2 rows left out" in (bad.summary() or "")


def test_a_file_of_corrupt_rows_alone_is_an_error_with_either_policy(tmp_path: Path) -> None:
    write_data(tmp_path)
    (tmp_path / "boolq" / "train.jsonl").write_text("{}\n{}\n")
    with pytest.raises(UserError, match="boolq/train.jsonl: the file has no usable rows"):
        load_tasks(CommonsenseDataConfig(source=str(tmp_path), bad_rows="skip"))


# ------------------------------------------------------------------------------------------------------------- secrets

TOKEN = "hf_" + "aB3" * 11


def test_secrets_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["recipe.py", "--hub-token", "plainword", "--model", f"https://me:{TOKEN}@host/x", f"--x=y?token={TOKEN}"]
    monkeypatch.setattr(sys, "argv", [*command, "--max-new-tokens", "12"])
    config = CommonsenseConfig(
        model=ModelConfig(name=f"https://me:pass-word@host/model?sig={TOKEN}"),
        train=TrainConfig(output_dir=str(tmp_path)),
    )
    RunFolder(config, True, {})
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert not any(secret in written for secret in (TOKEN, "plainword", "pass-word"))
    assert json.loads((tmp_path / "run.json").read_text())["command"] == [
        "recipe.py", "--hub-token", "***", "--model", "https://***@host/x", "--x=y?token=***", "--max-new-tokens", "12",
    ]  # fmt: skip


def test_what_is_no_secret_stays() -> None:
    words = ["--token-type", "a", "--tasks", "boolq", "a/b:1", "meta-llama/Llama-3.1-8B", "hf_hub", "monkey=3", "x@y"]
    assert redacted_command(words) == words
    assert redacted({"a": [1, None, "plain"], "b": 2.5}) == {"a": [1, None, "plain"], "b": 2.5}


# ------------------------------------------------------------------------------------------------------------ pickles

NAMES = (
    "pytorch_model.bin", "pytorch_model.pt", "model.pt", "model.pth", "model.ckpt", "model.pkl", "adapter_model.bin",
    "training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "rng_state.pth",
    "rng_state_0.pth", "random_states_0.pkl", "scaler.pt", "trainer_state.pt", "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt", ".metadata", "__0_0.distcp", "state.pkl", "tokenizer.pkl",
    "dataset.pkl", "train.pkl", "train.pt", "cache.pkl",
)  # fmt: skip


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def plant(folder: Path, evil: Evil) -> None:
    for index, name in enumerate(NAMES):  # as torch saves it, and as pickle does
        if index % 2 and not name.startswith("."):
            torch.save({"weights": evil}, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(evil))


def audited_recipe(rank: int, world_size: int, arguments: list[str], report: Path, evil: Path) -> None:
    """The recipe with an audit hook that writes down everything that is unpickled; then a positive control."""
    events: list[str] = []
    sys.addaudithook(lambda event, args: events.append(str(args)) if event == "pickle.find_class" else None)
    sys.argv = [str(RECIPE), *arguments]
    runpy.run_path(str(RECIPE), run_name="__main__")
    during = list(events)
    assert not evil.exists()
    pickle.loads(pickle.dumps(Evil(evil)))
    raw = len(events) - len(during)
    torch.save(Evil(evil), report.parent / "control.pt")
    torch.load(report.parent / "control.pt", weights_only=False)
    report.write_text(json.dumps({"during": during, "raw": raw, "torch": len(events) - len(during) - raw}))


def test_no_file_is_ever_unpickled(tmp_path: Path) -> None:
    project, evil = Project(tmp_path), tmp_path / "evil-was-here"
    output = tmp_path / "run"
    folders = [project.model, project.data, project.data / "boolq", output, output / "checkpoints", output / "adapter"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        plant(folder, Evil(evil))
    ranks = Ranks(1, tmp_path, audited_recipe, project.arguments(output), tmp_path / "report.json", evil)
    [ended] = ranks.wait()
    assert ended.code == 0, ended.log
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["during"] == []
    assert report["raw"] >= 1 and report["torch"] >= 1 and evil.exists()  # the hook and the pickles are what they seem
    assert (output / "merged" / "model.safetensors").exists()


def test_pickled_weights_need_a_flag_and_even_then_run_no_code(tmp_path: Path) -> None:
    project, evil = Project(tmp_path), tmp_path / "evil-was-here"
    weights = AutoModelForCausalLM.from_pretrained(project.model).state_dict()
    (project.model / "model.safetensors").unlink()
    torch.save(weights, project.model / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_backbone(ModelConfig(name=str(project.model)), AutoModelForCausalLM)
    allowed = ModelConfig(name=str(project.model), allow_pickle_weights=True)
    model, _ = load_backbone(allowed, AutoModelForCausalLM)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    torch.save(weights | {"lm_head.weight": Evil(evil)}, project.model / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights.only|unsupported"):
        load_backbone(allowed, AutoModelForCausalLM)
    assert not evil.exists()


def test_merging_into_pickled_weights_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="allow_pickle_weights true with export_formats merged"):
        RunConfig(model=ModelConfig(allow_pickle_weights=True))


# ---------------------------------------------------------------------------------------- code of model repositories


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("load", [load_tokenizer, lambda config: load_backbone(config, AutoModelForCausalLM)])
def test_code_of_a_model_is_refused_without_asking(tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, evil = Project(tmp_path).model, tmp_path / "evil-was-here"
    (folder / "custom.py").write_text(f"open({str(evil)!r}, 'w')\n")
    change_json(folder / "config.json", model_type="custom", auto_map={"AutoConfig": "custom.Config"})
    change_json(
        folder / "tokenizer_config.json", tokenizer_class="Custom", auto_map={"AutoTokenizer": [None, "custom.Custom"]}
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="cannot be loaded .*custom code"):
        load(ModelConfig(name=str(folder)))
    assert not evil.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_refused_even_if_code_is_trusted(tmp_path: Path, file: str) -> None:
    """The pinned commit is the model's; the other repository's would be whatever its main branch is."""
    folder = Project(tmp_path).model
    trusted = ModelConfig(name=str(folder), trust_remote_code=True, revision="0" * 40)
    load_tokenizer(trusted)
    change_json(folder / file, auto_map={"AutoTokenizer": ["someone/else--custom.Custom", None]})
    with pytest.raises(UserError, match="someone/else--custom.Custom, which revision does not pin"):
        load_tokenizer(trusted)
    with pytest.raises(UserError, match="someone/else--custom.Custom, which revision does not pin"):
        load_backbone(trusted, AutoModelForCausalLM)


@pytest.mark.parametrize("change", ["another word", "another file", "a file less", "another name"])
def test_code_in_a_folder_is_pinned_by_what_it_says(tmp_path: Path, change: str) -> None:
    """A folder has no commits, so any forty digits would do there."""
    folder, others = tmp_path / "model", tmp_path / "model" / "parts"
    others.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "custom.Config"}}))
    (folder / "custom.py").write_text("one = 1\n")
    (others / "more.py").write_text("two = 2\n")
    trusted = ModelConfig(name=str(folder), trust_remote_code=True, revision="0" * 40)

    def digest() -> str:
        [found] = re.findall(r"--revision ([0-9a-f]{40})", refusal(refuse_code_from_elsewhere, trusted))
        return str(found)

    first = digest()
    pinned = trusted.model_copy(update={"revision": first})
    refuse_code_from_elsewhere(pinned)
    match change:
        case "another word":
            (others / "more.py").write_text("two = 3\n")
        case "another file":
            (folder / "new.py").write_text("")
        case "a file less":
            (others / "more.py").unlink()
        case "another name":
            (folder / "custom.py").rename(folder / "other.py")
    assert digest() != first and "is not that of the code" in refusal(refuse_code_from_elsewhere, pinned)


# ------------------------------------------------------------------------------------------------------------- memory


def test_cheapest_changes_fit_the_run() -> None:
    config = CommonsenseConfig(train=TrainConfig(batch_size=24, micro_batch_size=12))
    first = cheapest_changes(config, "ddp", 2, weights_weigh_most=False)
    assert len(first) == 3 and first[0].startswith("micro_batch_size 12 -> 6") and "checkpointing" in first[1]
    for tokens, told in ((4096, "micro_batch_tokens 4096 -> 2048"), (400, "micro_batch_tokens 400 -> 256"), (256, "g")):
        by_tokens = CommonsenseConfig(train=TrainConfig(micro_batch_tokens=tokens))
        assert cheapest_changes(by_tokens, "ddp", 2, weights_weigh_most=False)[0].startswith(told)
    first = cheapest_changes(config, "ddp", 2, weights_weigh_most=True)
    assert "bfloat16" in first[0] and "fsdp2" in first[1]
    spent = CommonsenseConfig(
        train=TrainConfig(batch_size=2, micro_batch_size=1, gradient_checkpointing=True, precision="bf16"),
        model=ModelConfig(dtype="bfloat16"),
    )
    first = cheapest_changes(spent, "zero3", 2, weights_weigh_most=False)
    assert first[0].startswith("max_length 256 -> 128") and "nf4" in first[1] and "more processes" in first[2]
