"""A run over experts, stopped and continued: bit for bit the run that was not, before compaction and after it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from adalora_dist import AdaLoraConfig, adapt, attach
from adalora_dist.artifacts.checkpoints.content import held_parts, load_checkpoint, stored_adapters
from adalora_dist.artifacts.checkpoints.writer import CheckpointWriter, newest_checkpoint
from adalora_dist.methods import method_for
from adalora_dist.methods.protocol import trained_parameters
from tests.support.expert_models import loss_of, mixture
from tests.support.steps import make_steps

STEPS = 10
SETTINGS = AdaLoraConfig(
    init_rank=3, target_rank=1.5, initial_warmup_steps=1, final_steps=4, mask_interval_steps=2, alpha=6,
    expert_scores="per_token",
)  # fmt: skip
RUN = {"config": {"adapter": SETTINGS.model_dump()}}


def go_on(model: Any, optimizer: Any, hooks: Any, first: int, stop: int) -> list[float]:
    return make_steps(model, optimizer, hooks, partial(loss_of, model), range(first, stop))


def attached(model: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return optimizer, attach(model, optimizer, SETTINGS, STEPS)


@pytest.mark.parametrize("stop", [3, 8])
def test_a_continued_run_is_the_same_bit_for_bit(stop: int, tmp_path: Path) -> None:
    model = mixture("qwen3_moe")
    adapt(model, SETTINGS)
    optimizer, hooks = attached(model)
    go_on(model, optimizer, hooks, 0, stop)
    CheckpointWriter(tmp_path, keep=1).save(stop, trained_parameters(model), optimizer, hooks, RUN)
    assert hooks.method_step.compacted == (stop == 8)
    expected = go_on(model, optimizer, hooks, stop, STEPS)
    hooks.finish()

    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    again = mixture("qwen3_moe")
    adapters = adapt(again, SETTINGS)
    method_for(SETTINGS).shrink(adapters, held_parts(checkpoint, adapters))
    optimizer, hooks_again = attached(again)
    load_checkpoint(checkpoint, trained_parameters(again), optimizer, hooks_again)
    assert go_on(again, optimizer, hooks_again, stop, STEPS) == expected
    hooks_again.finish()
    assert hooks_again.rank_pattern() == hooks.rank_pattern()
    for own, other in zip(trained_parameters(again).values(), trained_parameters(model).values(), strict=True):
        assert torch.equal(own, other)


def test_an_export_from_a_checkpoint_has_every_expert(tmp_path: Path) -> None:
    model = mixture("mixtral")
    adapt(model, SETTINGS)
    optimizer, hooks = attached(model)
    go_on(model, optimizer, hooks, 0, STEPS)
    CheckpointWriter(tmp_path, keep=1).save(STEPS, trained_parameters(model), optimizer, hooks, RUN)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    stored, others = stored_adapters(checkpoint)
    assert not others and [update.name for update in stored] == [update.name for update in hooks.updates()]
    for own, other in zip(stored, hooks.updates(), strict=True):
        assert torch.equal(own.delta(), other.delta())
