"""Small models and training loops that several tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adalora_dist.config.methods import MethodConfig
from adalora_dist.methods.inject import adapt
from tests.support.settings import adapter_section


class Block(nn.Module):
    def __init__(self, d: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(d, hidden, bias=bias)
        self.down = nn.Linear(hidden, d, bias=bias)
        self.skip = False  # a layer that takes no part in a step, and so has no gradient

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.skip else x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Two blocks and a head: four adapted matrices of odd sizes; the head is left alone."""

    def __init__(self, d: int = 7, hidden: int = 13, num_blocks: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(d, hidden, bias) for _ in range(num_blocks))
        self.head = nn.Linear(d, 3)
        self._no_split_modules = ["Block"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TextNet(nn.Module):
    """Net's inputs, rounded to tokens, and outputs, through the layers of a causal language model."""

    def __init__(self) -> None:
        from tests.support.tiny_language_model import tiny_llama

        super().__init__()
        self.text = tiny_llama(40).model
        self.head = nn.Linear(32, 3)

    @property
    def base_model(self) -> nn.Module:
        return self.text

    @property
    def blocks(self) -> nn.ModuleList:
        return self.text.layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = (4 * x).long().clamp(-16, 16) + 20
        return self.head(self.text(input_ids=tokens).last_hidden_state[:, -1])


def net_for(config: MethodConfig, **sizes: int) -> Any:
    """What a method is tried on: Net, or TextNet for one that needs the layers of a language model."""
    if config.method == "prefix":
        return TextNet()
    return Net(**sizes, bias=config.method != "low_rank")  # factors have no place for biases


def adapted_net(config: MethodConfig, seed: int = 0, **sizes: int) -> Any:
    torch.manual_seed(seed)
    model = net_for(config, **sizes)
    adapt(model, config, seed)
    return model


def config(method: str = "adalora", **changes) -> Any:
    """Rank 3 on every matrix, pruned to half; large learning signals so that patterns move."""
    values = dict(
        init_rank=3, target_rank=1.5, alpha=6, targets=("up", "down"), positions=("up", "down"), start="paper",
        drop_layers=1, init="orthonormal", initial_warmup_steps=4, final_steps=12, mask_interval_steps=3,
        orthogonality=0.1,
    )  # fmt: skip
    return adapter_section(method, **{**values, **changes})


def global_batch(step: int, size: int = 12, d: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (size, d) of a step and what a fixed teacher says of them (size, 3), the same everywhere."""
    teacher = torch.randn(d, 3, generator=torch.Generator().manual_seed(1))
    x = torch.randn(size, d, generator=torch.Generator().manual_seed(1000 + step))
    return x, torch.sin(x @ teacher)
