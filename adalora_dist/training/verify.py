"""Does the exported model say what the trained one says? Logits of one sequence, before and after the round trip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from adalora_dist.tasks.evaluation.batches import evaluating

Probe = Sequence[int] | Mapping[str, Sequence[int]]
"""Tokens of one sequence for a causal model, or for an encoder-decoder input_ids and decoder_input_ids."""


def last_logits(model: nn.Module, probe: Probe, num_last: int, device: torch.device) -> torch.Tensor:
    """Logits of the last ``num_last`` tokens of one sequence, (num_last, vocabulary), float32 on the CPU.

    Collective where the model is sharded.
    """
    if isinstance(probe, Mapping):
        batch: dict[str, Any] = {name: torch.tensor([list(ids)], device=device) for name, ids in probe.items()}
    else:
        batch = {"input_ids": torch.tensor([list(probe)], device=device), "logits_to_keep": num_last}
    with evaluating(model):
        logits: torch.Tensor = model(**batch).logits[0, -num_last:].float().cpu()
    return logits


def load_plainly(auto_class: Any, folder: Path) -> nn.Module:
    """The model in ``folder`` as plain transformers loads it, float32 if its files are, in evaluation mode.

    For one process, at the end of a run: under ZeRO-3, loading would otherwise be collective, so that is turned off.
    """
    unset_hf_deepspeed_config()
    model: nn.Module = auto_class.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
    return model.eval()


class LogitDifference(NamedTuple):
    """Absolute differences over the tokens compared and all entries of the vocabulary."""

    largest: float
    mean: float

    def as_record(self, expected: torch.Tensor) -> dict[str, float]:
        """For verification.json, with the size of the logits they are to be compared with."""
        return {
            "largest_logit_difference": self.largest,
            "mean_logit_difference": self.mean,
            "largest_logit": expected.abs().max().item(),
        }

    def as_sentence(self, what: str, expected: torch.Tensor) -> str:
        """For the console; ``what`` was compared."""
        return (
            f"Merged model in plain transformers: {what}'s logits differ from the trained model's by at most "
            f"{self.largest:.1e}, on average by {self.mean:.1e} (of up to {expected.abs().max():.1f})"
        )


def logit_differences(auto_class: Any, folder: Path, probe: Probe, expected: torch.Tensor) -> LogitDifference:
    """How far the last logits of the model in ``folder``, loaded afresh in plain transformers, are from ``expected``.

    For one process, at the end of a run: see :func:`load_plainly`.
    """
    model = load_plainly(auto_class, folder)
    difference = (last_logits(model, probe, len(expected), torch.device("cpu")) - expected).abs()
    return LogitDifference(difference.max().item(), difference.mean().item())
