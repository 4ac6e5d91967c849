"""Blocks that FSDP2 gathers ahead; that nothing else changes is in test_forwards.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adalora_dist.config.sections import TrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.training.compiled import blocks_of
from adalora_dist.training.engine import build_accelerator
from adalora_dist.training.prefetch import prefetch_blocks
from tests.support.recipe_runs import run_recipe


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


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="fsdp_prefetch 2: Linear does not say what its blocks are; set fsdp_prefetch"):
        prefetch_blocks(nn.Linear(2, 2), 2)


def test_a_dry_run_refuses_it_as_the_run_does(tmp_path: Path) -> None:
    words = ["--dry-run", "--output-dir", str(tmp_path), "--fsdp-prefetch", "2"]
    code, _, errors = run_recipe("llama_commonsense", 1, words)
    assert code == 2 and "fsdp_prefetch 2: only FSDP2 on two or more processes gathers blocks ahead" in errors
