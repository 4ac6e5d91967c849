"""How many tokens each expert has seen, for scores by token instead of by step.

The gradient of an expert is a sum over the tokens that were sent to it. Of two experts whose tokens teach as much each,
the one that gets a tenth of the tokens has a tenth of the sensitivity and of the uncertainty, and a hundredth of the
score. That is right where each token counts the same, and prunes rare experts that matter to rare tokens. Divided by
the share of tokens, once for each average that the score is a product of, scores are about a token of the expert's own.

Tokens are counted in the steps that allocate, summed with the scores in their one reduction, and smoothed over
allocations: all ranks know the same shares, and nothing is pending between two steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adalora_dist.config.methods import AdaLoraConfig, AdaptiveConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.experts import ExpertTriplets
from adalora_dist.methods.adalora.layers import TripletLayer

_NUM_AVERAGES = {"sensitivity_uncertainty": 2, "sensitivity": 1}
"""How often the share of tokens is in a score."""
_SMALLEST_SHARE = 1e-6
"""Of an even one; an expert that has seen no token has no score either."""


class TokensSeen:
    """Counts for the experts among ``layers``; nothing at all where scores are by step.

    Args:
        layers: all adapted layers, in canonical order.

    Raises:
        UserError: scores are to be by token, and there are no experts.
    """

    def __init__(self, layers: Sequence[TripletLayer], config: AdaptiveConfig) -> None:
        self._layers = list(layers)
        self._stacks = [layer for layer in layers if isinstance(layer, ExpertTriplets)]
        if not (isinstance(config, AdaLoraConfig) and config.expert_scores == "per_token"):
            self._stacks = []
        elif not self._stacks:
            raise UserError(
                "expert_scores=per_token: no stack of experts is adapted whose tokens could be counted: add experts to "
                "targets, or leave expert_scores out"
            )
        for stack in self._stacks:
            stack.count_tokens()
        self._beta, self._power = config.beta1, _NUM_AVERAGES.get(config.importance, 0)
        self.smoothed: list[float] = [0.0] * sum(len(stack.init_ranks) for stack in self._stacks)
        """Tokens of each expert, of one stack after the other."""

    def partials(self) -> list[torch.Tensor]:
        """Of every stack the tokens of this step on this rank, (experts,) float64."""
        return [stack.num_tokens for stack in self._stacks if stack.num_tokens is not None]

    def clear(self) -> None:
        """The step is over."""
        for stack in self._stacks:
            if stack.num_tokens is not None:
                stack.num_tokens.zero_()

    def weigh(self, scores: torch.Tensor, tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """Divide the scores (triplets at the start of the run,) by the shares of tokens, those of this step included.

        Args:
            tokens: what :meth:`partials` of all ranks add up to. Read by the host.
        """
        if not self._stacks:
            return scores
        pairs = zip(self.smoothed, torch.cat(list(tokens)).tolist(), strict=True)
        self.smoothed = [self._beta * before + (1 - self._beta) * now for before, now in pairs]
        divisors, first = [], 0
        for layer in self._layers:
            if layer not in self._stacks:
                divisors.append(torch.ones(layer.init_rank, dtype=scores.dtype))
                continue
            num_experts = len(layer.init_ranks)
            seen = torch.tensor(self.smoothed[first : first + num_experts], dtype=scores.dtype)
            shares = (seen / seen.mean().clamp(min=1e-12)).clamp(min=_SMALLEST_SHARE) ** self._power
            divisors.append(shares.repeat_interleave(torch.tensor(layer.init_ranks)))
            first += num_experts
        return scores / torch.cat(divisors).to(scores.device)
