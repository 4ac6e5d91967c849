"""Cross-entropies of next tokens, with logits at the targets alone, and not of all targets at once.

The vocabulary is the widest matrix that many models have: float32 logits of 8,192 tokens of Llama 3 are 4.2 GB, and
with what their gradients need 16 bytes an element. So the head's own ``forward`` is replaced for the time of a call of
the model. It is given the hidden states, picks those that have a target, and makes logits of them: of all, or chunk by
chunk, where it gives up each chunk's logits for its loss. An engine notices nothing: the head is called once, where and
when it always was, and FSDP2 and ZeRO-3 gather it as ever.

A head that is frozen, as with most methods, makes the gradient of the hidden states at once, so that no logits are made
twice; one that is trained makes a chunk's logits again in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adalora_dist.backbones.merging import forward_of
from adalora_dist.io.errors import UserError
from adalora_dist.sharding.tensors import class_name
from adalora_dist.tasks.evaluation.batches import evaluating
from adalora_dist.tasks.padding import unwrapped
from adalora_dist.tasks.rows.tokens import IGNORED

LogitsChunk = Literal["auto"] | int
"""Targets whose logits are in memory at a time; 0: all; auto: as many as have ``AUTO_LOGITS`` logits."""

AUTO_LOGITS = 2**26
BYTES_PER_LOGIT = 16
"""At the peak of a chunk, in bf16: logits and their gradient (2 each), both in float32, and log-probabilities."""
_MARK = 64.0  # exact in every type, and changed by whatever a model does to its logits: soft caps, factors

Head = Callable[[torch.Tensor], torch.Tensor]


class TokenLosses:
    """Sums of cross-entropies by a model with a language-model head; ``logits_chunk`` as :data:`LogitsChunk`."""

    def __init__(self, logits_chunk: LogitsChunk = "auto") -> None:
        self.logits_chunk = logits_chunk
        self._ends_in_head: bool | None = None

    def __call__(self, model: nn.Module, inputs: Mapping[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        """
        Args:
            inputs: of the model, on its device; integers [rows, tokens], but for ``logits_to_keep``.
            targets: [rows, positions] on the CPU: what the model's logits shall predict; ``IGNORED``: nothing.

        Returns:
            Their sum over all targets, float32, with gradient; 0 where there is none.

        Raises:
            UserError: ``logits_chunk`` is a number, and logits of this model cannot be made in chunks.
        """
        head, device = unwrapped(model).get_output_embeddings(), inputs["input_ids"].device
        labels = targets.flatten()
        chosen = (labels != IGNORED).nonzero().flatten()
        size = self._size(model, head, inputs)
        if not len(chosen):
            chosen = torch.zeros(1, dtype=torch.long)  # a forward may be collective, and so may its backward be
        labels, index = labels[chosen].to(device), chosen.to(device)
        # Sequences side by side in a row are told by their positions, if there is no cache.
        options = {"use_cache": False} if "position_ids" in inputs else {}
        passed = _Passed()

        def kept(tensor: torch.Tensor) -> torch.Tensor:
            """At ``logits_to_keep``, also of a model that has ignored it."""
            is_whole = tensor.ndim == 3 and tensor.shape[1] != targets.shape[1] and "logits_to_keep" in inputs
            return tensor[:, inputs["logits_to_keep"]] if is_whole else tensor

        def at_targets(hidden: torch.Tensor) -> torch.Tensor:
            hidden = kept(hidden)
            states = hidden.reshape(-1, hidden.shape[-1]).index_select(0, index)
            if size is None or len(labels) <= size:
                return plain(states).unsqueeze(0)
            passed.total = total = _in_chunks(head, plain, states, labels, size)
            carried: torch.Tensor = _Carry.apply(total, passed)  # type: ignore[no-untyped-call]
            return carried

        if head is None:
            logits = model(**inputs, **options).logits
        else:
            plain: Head = head.forward
            with forward_of(head, at_targets):
                logits = model(**inputs, **options).logits
        if passed.total is not None:
            received: torch.Tensor = _Receive.apply(logits, passed)  # type: ignore[no-untyped-call]
            return received
        if logits.shape[:-1].numel() != len(labels):  # a model that does not call its head
            logits = kept(logits).flatten(0, 1).index_select(0, index)
        logits = logits.flatten(0, -2)
        return nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")

    def _size(self, model: nn.Module, head: nn.Module | None, inputs: Mapping[str, torch.Tensor]) -> int | None:
        """Targets of a chunk; None: all at once."""
        if self.logits_chunk == 0:
            return None
        if self._ends_in_head is None:  # at the first call on every process: it is collective
            self._ends_in_head = head is not None and _ends_in_head(model, head, inputs)
            if not self._ends_in_head and self.logits_chunk != "auto":
                raise _no_chunks(model, self.logits_chunk)
        if not self._ends_in_head:
            return None
        return self.logits_chunk if self.logits_chunk != "auto" else automatic_chunk(vocabulary_of(model))


def refuse_chunks(model: nn.Module, logits_chunk: LogitsChunk) -> None:
    """Raise if ``logits_chunk`` is a number, and logits of this model cannot be made in chunks. Tried; collective.

    Raises:
        UserError: so it is.
    """
    if logits_chunk in ("auto", 0):
        return
    inner = unwrapped(model)
    with evaluating(model) as device:
        ids = torch.ones((1, 2), dtype=torch.long, device=device)
    inputs = {"input_ids": ids, "attention_mask": ids}
    if inner.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    head = inner.get_output_embeddings()
    if head is None or not _ends_in_head(model, head, inputs):
        raise _no_chunks(model, logits_chunk)


def _no_chunks(model: nn.Module, logits_chunk: LogitsChunk) -> UserError:
    name = class_name(unwrapped(model))
    return UserError(
        f"logits_chunk={logits_chunk}: {name} does something to its logits behind its head, so they cannot be made in "
        "chunks: set logits_chunk to auto or 0"
    )


def automatic_chunk(vocabulary: int) -> int:
    """Targets whose logits are made at a time, for a number of words."""
    return max(1, AUTO_LOGITS // vocabulary)


def logits_bytes(num_targets: int, vocabulary: int, logits_chunk: LogitsChunk = "auto") -> int:
    """Peak of what logits, their gradients and probabilities take, by formula; hidden states not counted."""
    size = automatic_chunk(vocabulary) if logits_chunk == "auto" else logits_chunk or num_targets
    return BYTES_PER_LOGIT * vocabulary * min(size, num_targets)


def vocabulary_of(model: nn.Module) -> int:
    """Words that the model has logits of."""
    return int(unwrapped(model).config.get_text_config().vocab_size)


def _ends_in_head(model: nn.Module, head: nn.Module, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether the model's logits are what its head gives, and nothing else: tried with two tokens. Collective."""
    few = {name: tensor[:1, :2] for name, tensor in inputs.items() if tensor.ndim == 2}
    with evaluating(model), forward_of(head, lambda hidden: hidden.new_full((1, 1, 1), _MARK)):
        try:
            logits: torch.Tensor = model(**few).logits
        except (RuntimeError, ValueError, IndexError):  # what follows wants a logit of every word
            return False
    return logits.shape == (1, 1, 1) and float(logits) == _MARK


def _in_chunks(head: nn.Module, plain: Head, states: torch.Tensor, labels: torch.Tensor, size: int) -> torch.Tensor:
    """Sum of the losses of ``states`` (targets, d), ``size`` targets at a time."""

    def loss_of(part: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(plain(part).float(), wanted, reduction="sum")

    if any(p.requires_grad for p in head.parameters()) and torch.is_grad_enabled():
        parts = zip(states.split(size), labels.split(size), strict=True)
        losses = [checkpoint(loss_of, part, wanted, use_reentrant=False) for part, wanted in parts]
        return torch.stack(losses).sum()
    total: torch.Tensor = _Frozen.apply(states, labels, size, loss_of)  # type: ignore[no-untyped-call]
    return total


class _Frozen(torch.autograd.Function):
    """Losses through a frozen head: of each chunk the gradient is made with the loss, and then no logits are left."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        labels: torch.Tensor,
        size: int,
        loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        gradients, losses = [], []
        for part, wanted in zip(states.split(size), labels.split(size), strict=True):
            if not ctx.needs_input_grad[0]:
                losses.append(loss_of(part, wanted))
                continue
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                loss = loss_of(leaf, wanted)
            gradients += torch.autograd.grad(loss, leaf)
            losses.append(loss.detach())
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        [of_states] = ctx.saved_tensors
        return (of_states * gradient).to(of_states.dtype), None, None, None


class _Passed:
    """The loss on its way from head to loop, past the model, and the loss's gradient on its way back.

    Engines may round what a model gives to 16 bits: a loss must not be.
    """

    total: torch.Tensor | None = None
    gradient: torch.Tensor | None = None


class _Carry(torch.autograd.Function):
    """At the head: what the model takes for logits. Its gradient is what :class:`_Receive` has left."""

    @staticmethod
    def forward(ctx: Any, total: torch.Tensor, passed: _Passed) -> torch.Tensor:
        ctx.passed = passed
        return total.new_full((1, 1, 1), _MARK)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return ctx.passed.gradient, None


class _Receive(torch.autograd.Function):
    """Behind the model: the loss itself."""

    @staticmethod
    def forward(ctx: Any, carried: torch.Tensor, passed: _Passed) -> torch.Tensor:
        assert passed.total is not None
        ctx.passed = passed
        ctx.save_for_backward(carried)
        return passed.total.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.passed.gradient = gradient
        [carried] = ctx.saved_tensors
        return torch.ones_like(carried), None
