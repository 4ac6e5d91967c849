"""Does the exported model say what the trained one says? Logits of one sequence, before and after the round trip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from adalora_dist.evaluation.results import evaluating


def last_logits(model: nn.Module, input_ids: Sequence[int], num_last: int, device: torch.device) -> torch.Tensor:
    """Logits of the last ``num_last`` tokens of one sequence, (num_last, vocabulary), float32 on the CPU.

    Collective where the model is sharded.
    """
    with evaluating(model):
        batch = torch.tensor([list(input_ids)], device=device)
        return model(input_ids=batch, logits_to_keep=num_last).logits[0].float().cpu()


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


def logit_differences(
    auto_class: Any, folder: Path, input_ids: Sequence[int], expected: torch.Tensor
) -> LogitDifference:
    """How far the last logits of the model in ``folder``, loaded afresh in plain transformers, are from ``expected``.

    For one process, at the end of a run: under ZeRO-3, loading would otherwise be collective, so that is turned off.
    """
    unset_hf_deepspeed_config()
    model = auto_class.from_pretrained(folder, use_safetensors=True)
    difference = (last_logits(model, input_ids, len(expected), torch.device("cpu")) - expected).abs()
    return LogitDifference(difference.max().item(), difference.mean().item())
