"""Blocks that FSDP2 gathers ahead; that nothing else changes is in test_forwards.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from adalora_dist.config.sections import TrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.training.compiled import blocks_of
from adalora_dist.training.engine import build_accelerator
from adalora_dist.training.prefetch import prefetch_blocks


def test_each_block_has_its_neighbours_nearest_first() -> None:
    shape: dict[str, Any] = dict(num_hidden_layers=4, hidden_size=4, intermediate_size=4, num_attention_heads=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4, **shape))
    blocks: list[Any] = blocks_of(model)
    ahead: dict[tuple[str, int], list[int]] = {}
    for index, block in enumerate(blocks):
        for way in ("forward", "backward"):
            note = partial(lambda key, asked: ahead.update({key: [*map(blocks.index, asked)]}), (way, index))
            setattr(block, f"set_modules_to_{way}_prefetch", note)
    prefetch_blocks(model, 2)
    assert [ahead["forward", index] for index in range(4)] == [[1, 2], [2, 3], [3], []]
    assert [ahead["backward", index] for index in range(4)] == [[], [0], [1, 0], [2, 1]]


@pytest.mark.parametrize(
    "environment", [{}, {"ACCELERATE_USE_DEEPSPEED": "true"}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}]
)
def test_it_is_refused_where_nothing_gathers_blocks(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match="fsdp_prefetch 2: only FSDP2 on two or more processes .* set fsdp_prefetch to"):
        build_accelerator(TrainConfig(fsdp_prefetch=2), environment)
