"""``adalora-dist export`` and ``inspect`` on the folder of a real run, and what they say to mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from adalora_dist.__main__ import main
from adalora_dist.artifacts.export import load_adapter, save_adapter
from adalora_dist.artifacts.hub.pictures import rank_grid
from adalora_dist.config.sections import ModelConfig, RunConfig, TrainConfig
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt
from adalora_dist.training.finish import write_adapters
from adalora_dist.training.run_folder import RunFolder
from tests.support.adapted_models import SETTINGS, STEPS, TOLERANCE, build, logits, weights_of, with_adapters
from tests.support.limits import HANG_SECONDS
from tests.support.paths import ROOT
from tests.support.ranks import run_ranks


def make_run(rank: int, world_size: int, path: Path) -> list[list[bool]]:
    """Train a tiny LLaMA and leave a run folder; what was kept at each allocation."""
    model = build("llama")
    model.save_pretrained(path / "base", max_shard_size="20KB")
    (path / "base" / "chat_template.jinja").write_text("{{ messages }}")
    adapt(model, SETTINGS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    hooks = attach(model, optimizer, SETTINGS, STEPS)
    allocator = hooks.method_step
    facts = {"num_trainable_parameters": 4321, "model_class": type(model).__name__}
    run = RunFolder(RunConfig(train=TrainConfig(output_dir=str(path / "run"))), True, facts)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        ids = torch.randint(3, 48, (2, 6), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            run.log_events(allocator)
    run.log_events(allocator)
    run.log_events(allocator)
    save_adapter(hooks.updates(), path / "run" / "adapter", str(path / "base"), None)
    hooks.finish()
    return [a.keep.tolist() for a in allocator.allocations]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[bool]]]:
    path = tmp_path_factory.mktemp("project")
    return path, run_ranks(1, make_run, path)[0]


@pytest.fixture
def run(project: tuple[Path, Any]) -> Path:
    return project[0] / "run"


def failure(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The one line that a command which fails leaves on standard error."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def succeed(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    main([str(word) for word in words])
    return capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("to", ["merged", "lora", "peft"])
def test_export_says_what_the_run_learnt(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    said = succeed(capsys, "export", run, "--to", to, "--out", tmp_path / "out")
    adapted = build("llama")
    load_adapter(adapted, run / "adapter")
    loaded = (
        type(build("llama")).from_pretrained(tmp_path / "out")
        if to == "merged"
        else PeftModel.from_pretrained(build("llama"), tmp_path / "out")
    )
    assert (logits(build("llama")) - logits(adapted)).abs().max() > 0.01
    assert (logits(loaded) - logits(adapted)).abs().max() <= TOLERANCE
    names: dict[str, Any] = {}
    code = said.split("To use it:\n\n")[1].split("\n\nvLLM")[0]
    exec(compile(code, "usage", "exec"), names)  # the lines as printed
    assert (logits(names["model"]) - logits(adapted)).abs().max() <= TOLERANCE
    assert ("--max-lora-rank 8" in said) == (to == "lora")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    if to == "merged":
        assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
        assert (tmp_path / "out" / "generation_config.json").is_file()


@pytest.mark.parametrize("num_before", [0, 5])
def test_a_classifier_comes_with_its_head_and_labels(
    num_before: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base is saved without its head, as encoders are, or with one for so many classes of another task; head and
    task are in the run folder alone."""
    model = build("deberta", id2label={0: "no", 1: "maybe", 2: "yes"}, label2id={"no": 0, "maybe": 1, "yes": 2})
    before = build("deberta", num_labels=num_before) if num_before else model
    before.deberta.load_state_dict(model.deberta.state_dict())
    (before if num_before else model.deberta).save_pretrained(tmp_path / "base")
    with_adapters(model)
    config = RunConfig(model=ModelConfig(name=str(tmp_path / "base")))
    trained = {n: p.detach() for n, p in model.named_parameters() if n.startswith(("classifier.", "pooler."))}
    assert write_adapters(config, model, weights_of(model), trained, tmp_path / "run") is None
    expected = logits(model)
    for to in ("merged", "lora", "peft"):
        said = succeed(capsys, "export", tmp_path / "run", "--to", to)
        names: dict[str, Any] = {}
        exec(compile(said.split("To use it:\n\n")[1], "usage", "exec"), names)  # the lines as printed
        assert (logits(names["model"]) - expected).abs().max() <= TOLERANCE, to
    merged = json.loads((tmp_path / "run" / "merged" / "config.json").read_text())
    assert merged["architectures"] == ["DebertaV2ForSequenceClassification"] and merged["id2label"]["1"] == "maybe"


def test_dtype_of_an_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for to in ("merged", "lora", "peft"):
        succeed(capsys, "export", run, "--to", to, "--out", tmp_path / to, "--dtype", "bfloat16")
        files = list((tmp_path / to).glob("*.safetensors"))
        assert len(files) == 1 or to == "merged"
        assert {t.dtype for file in files for t in load_file(file).values()} == {torch.bfloat16}
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    tensors = {k: (f.name, t) for f in (tmp_path / "merged").glob("*.safetensors") for k, t in load_file(f).items()}
    assert index["weight_map"] == {key: name for key, (name, _) in tensors.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in tensors.values())


def test_ranks_above_a_limit_are_refused_or_folded(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "out")
    line = failure(capsys, "export", run, "--to", "lora", "--max-rank", 1, *out)
    assert line.startswith("--max-rank 1: ") and "--fold" in line and not (tmp_path / "out").exists()
    said = succeed(capsys, "export", run, "--to", "lora", "--max-rank", 1, "--fold", *out)
    assert "to rank 1. Relative error of the update: " in said and "--max-lora-rank 1 " in said
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 1
    assert "Folded" not in succeed(capsys, "export", run, "--to", "lora", "--max-rank", 3, "--out", tmp_path / "same")


def test_one_rank_for_all(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeed(capsys, "export", run, "--to", "lora", "--pad", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] > 1 and config["rank_pattern"] == config["alpha_pattern"] == {}
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "out")
    adapted = build("llama")
    load_adapter(adapted, run / "adapter")
    assert (logits(loaded) - logits(adapted)).abs().max() <= TOLERANCE
    assert "--pad" in failure(capsys, "export", run, "--to", "peft", "--pad", "--out", tmp_path / "other")


def test_a_base_that_has_moved(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = tmp_path / "elsewhere"
    build("llama").save_pretrained(moved)
    succeed(capsys, "export", run, "--to", "merged", "--base", moved, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    succeed(capsys, "export", run, "--to", "lora", "--base", moved, "--out", tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(moved)


def test_the_commit_that_was_loaded_is_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the branch, which may have moved when somebody merges, or puts the adapter on it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # nobody has such a base: no waiting for it
    commit = "c0ffee" * 6 + "c0de"
    model = build("llama")
    model.config._commit_hash = commit  # as from_pretrained leaves it
    with_adapters(model)
    config = RunConfig(model=ModelConfig(name="somebody/a-base", revision="main"))
    write_adapters(config, model, weights_of(model), {}, tmp_path / "run")
    said = succeed(capsys, "export", tmp_path / "run", "--to", "lora")
    assert f"from_pretrained('somebody/a-base', revision='{commit}')" in said
    written = json.loads((tmp_path / "run" / "lora" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("somebody/a-base", commit)
    said = succeed(capsys, "export", tmp_path / "run", "--to", "peft", "--base", "somebody/another")
    assert "from_pretrained('somebody/another')" in said
    assert json.loads((tmp_path / "run" / "peft" / "adapter_config.json").read_text())["revision"] is None


def test_a_run_that_was_interrupted_is_told_what_can_be_done_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("adapter: {method: adalora}\n")
    for command in (["inspect", tmp_path], ["export", tmp_path, "--to", "lora"]):
        assert f"no checkpoint; adalora-dist watch {tmp_path} shows" in failure(capsys, *command)


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no finished run (there is no such folder)" in failure(
        capsys, "export", tmp_path / "nowhere", "--to", "lora"
    )
    assert "no finished run (it has no adapter" in failure(capsys, "inspect", tmp_path)
    assert "--to" in failure(capsys, "export", run)
    assert "'lara'" in failure(capsys, "export", run, "--to", "lara")
    assert "exists" in failure(capsys, "export", run, "--to", "lora", "--out", tmp_path)
    assert "--max-rank" in failure(capsys, "export", run, "--to", "lora", "--max-rank", "0")
    assert "--fold without --max-rank" in failure(capsys, "export", run, "--to", "lora", "--fold")
    assert "--merge-into" in failure(capsys, "export", run, "--to", "lora", "--merge-into", "dequantized")
    line = failure(capsys, "export", run, "--to", "merged", "--merge-into", "dequantized", "--out", tmp_path / "out")
    assert "quantized.json" in line
    assert "COMMAND" in failure(capsys)
    assert failure(capsys, "exprt", run).startswith("exprt is not a command: did you mean export")
    assert "complete," not in failure(capsys, "typo") and "choose from ls, cp, run" in failure(capsys, "typo")
    assert list(tmp_path.iterdir()) == []


def test_help_does_not_import_torch() -> None:
    for words in (["--help"], ["export", "--help"], ["export"]):
        command = [sys.executable, "-X", "importtime", "-m", "adalora_dist.__main__", *words]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
        assert process.returncode == (0 if "--help" in words else 2)
        imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines() if "import time:" in line}
        assert "argparse" in imported and not {"torch", "transformers", "peft", "matplotlib"} & imported


# ---------------------------------------------------------------------------------------------------------- inspect


def test_history_is_that_of_the_allocator(project: tuple[Path, list[list[bool]]]) -> None:
    path, keeps = project
    records = [json.loads(line) for line in (path / "run" / "allocations.jsonl").read_text().splitlines()]
    assert len(records) == len(keeps) >= 4
    assert [record["step"] for record in records] == sorted({record["step"] for record in records})
    before = [True] * len(keeps[0])
    for record, keep in zip(records, keeps, strict=True):
        assert record["budget"] == sum(keep) == sum(record["ranks"]) and record["lowest_kept_score"] >= 0
        changes = list(zip(before, keep, strict=True))
        assert (record["pruned"], record["returned"]) == (changes.count((True, False)), changes.count((False, True)))
        before = keep
    assert records[-1]["ranks"] == list(
        json.loads((path / "run" / "adapter" / "adapter.json").read_text())["rank_pattern"].values()
    )
    assert sum(record["pruned"] for record in records) > 0


def test_inspect_shows_ranks_sizes_and_pictures(
    project: tuple[Path, list[list[bool]]], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    said = succeed(capsys, "inspect", run)
    pattern = json.loads((run / "adapter" / "adapter.json").read_text())["rank_pattern"]
    tensors = load_file(run / "adapter" / "adapter.safetensors")
    active = sum(t.numel() for t in tensors.values())
    assert "model.layers.1" in said and f"Active adapter parameters: {active:,} in " in said and "4,321" in said
    assert f"budget {sum(project[1][0])} -> {sum(pattern.values())};" in said and "--to merged, lora or peft" in said
    for name, texts in (("ranks.svg", ["q_proj", "model.layers.1"]), ("history.svg", ["budget, triplets", "step"])):
        drawn = ElementTree.parse(run / name)
        written = {element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")}
        assert set(texts) <= written, name
    first = (run / "ranks.svg").read_bytes()
    succeed(capsys, "inspect", run)
    assert (run / "ranks.svg").read_bytes() == first
    assert not list(run.glob("*.png"))
    succeed(capsys, "inspect", run, "--pictures", "png")
    for name in ("ranks.png", "history.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
        (run / name).unlink()


def test_matrices_go_by_names_that_tell_them_apart() -> None:
    def columns(names: list[str]) -> list[str]:
        lines, columns, cells = rank_grid({name: index for index, name in enumerate(names)})
        assert len(cells) == len(names) and sorted(cells.values()) == list(range(len(names)))
        assert {place[0] for place in cells} == set(lines) and {place[1] for place in cells} == set(columns)
        return columns

    def block(stack: str, *matrices: str) -> list[str]:
        return [f"{stack}.{layer}.{matrix}" for layer in (0, 11) for matrix in matrices]

    assert columns(block("model.layers", "self_attn.q_proj", "mlp.up_proj")) == ["q_proj", "up_proj"]
    gpt2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert columns(block("transformer.h", *gpt2)) == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    deberta = ("attention.self.query_proj", "attention.output.dense", "intermediate.dense", "output.dense")
    assert columns(block("encoder.layer", *deberta)) == ["query_proj", *deberta[1:]]
    bart = [*block("encoder.layers", "self_attn.q_proj", "fc1"), *block("decoder.layers", "encoder_attn.q_proj", "fc1")]
    assert columns(bart) == ["self_attn.q_proj", "fc1", "encoder_attn.q_proj"]
    assert columns(["lm_head", "classifier"]) == ["rank"]


def test_inspect_without_matplotlib(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    with pytest.raises(SystemExit):
        main(["inspect", str(run)])
    printed = capsys.readouterr()
    assert "Active ranks" in printed.out
    assert printed.err.count("\n") == 1 and "adalora-dist[plots]" in printed.err
    assert "Active ranks" in succeed(capsys, "inspect", run, "--pictures", "none")


def test_a_run_without_adapters_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("adapter: {method: full}\n")
    for words in (("export", tmp_path, "--to", "lora"), ("inspect", tmp_path)):
        assert failure(capsys, *words).startswith(f"{tmp_path} has no adapters: a run with method full has none")
