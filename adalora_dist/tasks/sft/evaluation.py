"""What a run on texts of one's own is evaluated by: the validation loss, and replies to fixed prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from adalora_dist.tasks.evaluation.loss import validation_loss
from adalora_dist.tasks.evaluation.texts import generate_texts
from adalora_dist.tasks.losses import causal_loss
from adalora_dist.tasks.rows.tokens import padding_token
from adalora_dist.tasks.sft.config import SftEvaluationConfig
from adalora_dist.tasks.sft.rows import SftRows
from adalora_dist.tasks.sft.samples import Outcome, records_of, samples_text, share_exact
from adalora_dist.tasks.token_losses import LogitsChunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SftEvaluation:
    """Evaluates a model on the rows that are held out. Collective; the same on any number of processes.

    Args:
        ranks: this process's and how many there are, by the names that evaluations have for them.
        synced_gpus: see :func:`~adalora_dist.tasks.evaluation.texts.generate_texts`.
    """

    def __init__(
        self,
        rows: SftRows,
        tokenizer: PreTrainedTokenizerBase,
        settings: SftEvaluationConfig,
        device: torch.device,
        logits_chunk: LogitsChunk,
        ranks: Mapping[str, Any],
        synced_gpus: bool,
    ) -> None:
        self._rows, self._tokenizer, self._settings = rows, tokenizer, settings
        self._loss = causal_loss(rows.held_out, padding_token(tokenizer), device, logits_chunk)
        self._counts = rows.held_out["num_tokens"][:], rows.held_out["num_targets"][:]
        self._ranks, self._synced = ranks, synced_gpus

    def __call__(self, model: PreTrainedModel) -> Outcome:
        """The scores, and the reply to each sample's prompt."""
        settings, samples = self._settings, self._rows.samples
        scores = validation_loss(model, self._loss, *self._counts, settings.eval_batch_size, **self._ranks)
        prompts = [prompt for prompt, _ in samples]
        replies = generate_texts(
            model, self._tokenizer, prompts, [len(prompt) for prompt in prompts], settings, **self._ranks,
            synced_gpus=self._synced, closing=self._rows.closing,
        )  # fmt: skip
        return {"scores": scores | share_exact(replies, samples), "replies": replies}

    def scores(self, model: PreTrainedModel, say: Callable[[str], None]) -> dict[str, float]:
        """The scores of a model that is being trained; its replies are shown."""
        found = self(model)
        say(samples_text(records_of(self._rows.samples, {"now": found}, self._tokenizer)))
        return found["scores"]
