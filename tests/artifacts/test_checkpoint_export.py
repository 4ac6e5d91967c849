"""Exports from a checkpoint say what the run's model said, whatever engine wrote it; no process group is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adalora_dist.__main__ import main
from adalora_dist.artifacts.checkpoints.content import stored_adapters
from adalora_dist.artifacts.checkpoints.writer import checkpoint_at
from tests.support.ranks import run_ranks
from tests.support.resume_runs import configuration, run, whole_tensors, write_model

IDS = torch.tensor([[1, 5, 9, 4, 30, 2]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("engine", "method"),
    [
        ("single", "adalora"),
        *(pytest.param(e, m, marks=pytest.mark.slow) for e, m in (("fsdp2", "adalora"), ("zero3", "adalora"))),
        pytest.param("single", "lora", marks=pytest.mark.slow),
    ],
)
def test_every_form_from_a_checkpoint(tmp_path: Path, engine: str, method: str) -> None:
    write_model(tmp_path)
    world_size = 1 if engine == "single" else 2
    config = configuration(tmp_path, world_size, method=method, checkpoint_every=7, keep_checkpoints=9, dropout=0.0)
    result = run_ranks(world_size, run, engine, config)[0]
    folder = max((tmp_path / "run" / "checkpoints").glob("step-????????"))
    adapters, trained = stored_adapters(checkpoint_at(folder))
    assert {a.name for a in adapters} == result.adapters.keys() and trained.keys() == {"lm_head.weight"}
    for adapter in adapters:
        torch.testing.assert_close(adapter.delta(), result.adapters[adapter.name], rtol=1e-6, atol=1e-7)
    ranks = {a.rank for a in adapters}
    assert len(ranks) > 1 or method == "lora"

    merged = all_forms(folder, tmp_path / "end", tmp_path / "model")
    assert torch.equal(merged["lm_head.weight"], trained["lm_head.weight"])
    if method == "adalora":
        held = checkpoint_at(folder).state["triplets"].values()
        assert min(map(len, held)) < 3, "the pattern is frozen, and nothing was removed"
        check_between_two_selections(folder.with_name("step-00000028"), tmp_path)


def all_forms(checkpoint: Path, out: Path, base: Path) -> dict[str, torch.Tensor]:
    """Export each form, see that they say the same, and not what the base says; the merged tensors."""
    said = {}
    for to in ("merged", "lora", "peft"):
        main(["export", str(checkpoint), "--to", to, "--out", str(out / to)])
        plain = AutoModelForCausalLM.from_pretrained(out / "merged" if to == "merged" else base)
        said[to] = logits(plain if to == "merged" else PeftModel.from_pretrained(plain, out / to))
    assert (said["merged"] - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.01
    for form in ("lora", "peft"):
        assert (said[form] - said["merged"]).abs().max() <= 1e-5
    return load_file(out / "merged" / "model.safetensors")


def check_between_two_selections(folder: Path, place: Path) -> None:
    """Halfway, pruned triplets are still there, and may have grown again: the last selection counts."""
    checkpoint = checkpoint_at(folder)
    stored = whole_tensors(checkpoint)
    matrices = checkpoint.state["matrices"]
    assert {len(held) for held in checkpoint.state["triplets"].values()} == {3}
    merged, base = all_forms(folder, place / "middle", place / "model"), load_file(place / "model/model.safetensors")
    keep = stored["patterns"][-1].view(len(matrices), 3)
    assert 0 < keep.sum() < keep.numel() and (keep.sum(1) == 0).any()
    lams = stored["adalora.lam"].view(-1, 3)
    for (name, matrix), kept, lam in zip(matrices.items(), keep, lams, strict=True):
        p, qt = (stored[f"{name}.{kind}"].view(-1, 3) for kind in ("P", "Qt"))
        update = matrix["scale"] * (p * (lam * kept)) @ qt.T
        torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + update, rtol=0, atol=1e-5)


def test_nothing_is_written_into_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path)
    run_ranks(1, run, "single", configuration(tmp_path, checkpoint_every=7), (3, 0))
    folder = max((tmp_path / "run" / "checkpoints").glob("step-????????"))
    capsys.readouterr()
    for words, says in (
        (["export", str(folder), "--to", "lora"], "--out FOLDER"),
        (["export", str(folder), "--to", "lora", "--out", str(tmp_path / "run" / "lora")], "the run's own folder"),
        (["inspect", str(folder)], str(tmp_path / "run")),
        (["export", str(folder.with_name("step-99999999")), "--to", "lora", "--out", str(tmp_path / "x")], "99999999"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and says in line
    main(["inspect", str(tmp_path / "run"), "--pictures", "none"])  # the run has not come to its end
    said = capsys.readouterr().out
    assert f"newest checkpoint, after step {int(folder.name[5:])}" in said and "Active ranks" in said
    assert f"adalora-dist export {folder} --out FOLDER --to" in said
    (tmp_path / "run" / "run.json").write_text('{"base_commit": "c0ffee"}')
    monkeypatch.chdir(folder.parent)
    main(["export", folder.name, "--to", "lora", "--out", str(tmp_path / "lora")])
    assert '"revision": "c0ffee"' in (tmp_path / "lora" / "adapter_config.json").read_text()
    adapters, _ = stored_adapters(checkpoint_at(folder))  # of step 0: all triplets, and they say nothing yet
    assert {a.rank for a in adapters} == {3} and all(a.lam.eq(0).all() for a in adapters)
