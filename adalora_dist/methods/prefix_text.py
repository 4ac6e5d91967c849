"""A prefix that starts as a text: the keys and values that the plain model has of its first tokens.

They are read when the engine has taken the model over, by a forward that all processes make together, and so over any
backbone: read in parts, quantised, sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from adalora_dist.io.errors import UserError
from adalora_dist.methods.protocol import Adapter, Step, StepState
from adalora_dist.sharding.base import ShardEngine
from adalora_dist.tasks.evaluation.batches import evaluating


def check_text(tokens: Sequence[int], length: int) -> None:
    """Raise a ``UserError`` unless a text of these tokens fills ``length`` positions."""
    if len(tokens) < length:
        raise UserError(
            f"prefix_text has {len(tokens)} tokens, and prefix_length is {length}: write a longer text, or set "
            f"prefix_length to at most {max(1, len(tokens))}"
        )


class PrefixStep(Step):
    """Sees to it that a prefix which starts as a text has been given it.

    Args:
        adapters: one :class:`~adalora_dist.methods.prefix.Prefix`.
        waits: whether there is such a text.
    """

    def __init__(self, adapters: Sequence[Adapter], waits: bool) -> None:
        super().__init__(adapters)
        self._waits = waits

    @torch.no_grad()
    def start(self, engine: ShardEngine, model: nn.Module, tokens: Sequence[int]) -> None:
        prefix = cast(Any, self.adapters[0])
        check_text(tokens, prefix.length)
        with evaluating(model) as device, prefix.reading() as caches:
            model(input_ids=torch.tensor([tokens[: prefix.length]], device=device))
        [cache] = caches
        values = keys_and_values(cache).flatten()
        [span], [held] = engine.spans(), engine.values()
        engine.restore([values[span.start : span.stop].to(held.device)], [{}])
        self._waits = False

    def sums(self, step: int) -> None:
        if self._waits:
            raise UserError(
                "prefix_text was not read: call hooks.start(model, optimizer, tokens) once the engine has the model, "
                "and before the first step; HF Trainer has no place for it: use a recipe, or prefix_init zero"
            )

    def load_state(self, state: StepState) -> None:
        super().load_state(state)
        self._waits = False


def keys_and_values(cache: Any) -> torch.Tensor:
    """Of the one text in a cache of transformers', (tokens, 2 x layers x heads x head size), float32."""
    parts = [part[0].float() for layer in cache.layers for part in (layer.keys, layer.values)]
    return torch.stack(parts).permute(2, 0, 1, 3).flatten(1)
