"""Folders that runs of ``Trainer`` leave, and what the model of their moment computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from adalora_dist.artifacts.adapted_model import adapt
from tests.support.tiny_language_model import tiny_llama
from tests.support.trainer_runs import SETTINGS, VOCABULARY, example_rows

IDS = torch.tensor([example_rows()[3]["input_ids"]])


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.clone()


class LogitsOfCheckpoints(TrainerCallback):
    """What the model computes when a checkpoint has been written."""

    def __init__(self) -> None:
        self.logits: dict[int, torch.Tensor] = {}

    def on_save(self, args, state, control, model, **kwargs):
        self.logits[state.global_step] = logits_of(model)


def model_of(base: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapt(model, SETTINGS, seed=1)
    return model


def shared_base(folder: str) -> Path:
    base = Path(folder) / "base"
    if dist.get_rank() == 0:
        tiny_llama(VOCABULARY, hidden_size=16).save_pretrained(base)
    dist.barrier()
    return base


def differences(rank: int, world_size: int, folder: str, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: difference(Path(folder, name), Path(folder, "base"), logits) for name, logits in expected.items()}


def difference(saved: Path, base: Path, logits: torch.Tensor) -> float:
    """The largest of a folder's logits, over all the ways to load it, from those expected."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = [PeftModel.from_pretrained(plain, saved), AutoPeftModelForCausalLM.from_pretrained(saved)]
    loaded.append(AutoModelForCausalLM.from_pretrained(saved))
    with torch.no_grad():
        return max((model.eval()(IDS).logits - logits).abs().max().item() for model in loaded)
