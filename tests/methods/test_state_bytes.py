"""What AdaLoRA's state takes: the figures that documents have, from one function, against bytes that are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adalora_dist.methods.adalora import bound, products
from adalora_dist.methods.adalora.bound import portion_elements, state_bytes
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt
from tests.support.memory import peak_bytes
from tests.support.models import adapted_net, config, global_batch
from tests.support.ranks import run_ranks
from tests.support.tiny_language_model import tiny_llama


def run_in_portions(rank: int, world_size: int, min_portion: int, changes: dict[str, Any]) -> list[Any]:
    """Losses and patterns of a run in portions of at least so many elements, and the number of portions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bound, "MIN_PORTION", min_portion)
        patch.setattr(products, "_SIDE_BY_SIDE", min_portion)
        settings = config(compact=False, **changes)
        model = adapted_net(settings)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
        hooks, losses = attach(model, optimizer, settings, 30), []
        for step in range(30):
            x, y = global_batch(step)
            loss = (model(x) - y).square().mean()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        patterns = [allocation.keep.tolist() for allocation in hooks.method_step.allocations]
        return [losses, patterns, len(hooks.method_step.bound.layout.portions)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"orthogonality": 0.0}, {"importance": "magnitude"}],
    ids=["default", "no regulariser", "magnitude"],
)
def test_a_step_in_portions_is_the_same_step(changes):
    in_one, in_many = (run_ranks(1, run_in_portions, portion, changes)[0] for portion in (2**22, 25))
    assert in_one[2] == 1 and in_many[2] > 5
    torch.testing.assert_close(torch.tensor(in_many[0]), torch.tensor(in_one[0]), rtol=1e-5, atol=0)
    assert in_many[1] == in_one[1]  # products of fewer matrices at a time are rounded otherwise


def test_portions_are_few_and_a_64th():
    assert portion_elements(1000) == 2**22 and portion_elements(2**30) == 2**24
    assert sum(state_bytes(2**30).values()) == 24.125 * 2**30


def test_portions_fit_the_cache_of_a_cpu_core():
    assert portion_elements(1000, cached=True) == portion_elements(2**30, cached=True) == bound.CACHED_PORTION
    assert 24 < sum(state_bytes(20_000_000, cached=True).values()) / 20_000_000 < 24.06


def step_peaks(rank: int, world_size: int, method: str) -> tuple[int, int]:
    """(elements, peak bytes of a step and all that lasts) of adapters that weigh more than what two tokens leave."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bound, "MIN_PORTION", 1)
        patch.setattr(products, "_SIDE_BY_SIDE", 2**12)
        model = tiny_llama(16, 512)
        settings = config(method, init_rank=12, target_rank=6, targets=("all-linear",), compact=False)
        adapt(model, settings, 0)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        attach(model, optimizer, settings, 40).detach()
        ids = torch.arange(3, 5)[None]

        def step() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(3):
            step()
        held = sum(4 * p.numel() for p in trained)
        held += sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
        if method == "adalora":
            held += state_bytes(sum(p.numel() for p in trained))["importance"]
        return sum(p.numel() for p in trained), held + peak_bytes(step)


def test_the_function_says_what_is_counted():
    """Of whole steps: P diag(lambda) has gone, layer by layer, when the gradients that backward makes are all there."""
    num_elements, peak = run_ranks(1, step_peaks, "adalora")[0]
    num_of_lora, lora = run_ranks(1, step_peaks, "lora")[0]
    assert abs(peak / num_elements - sum(state_bytes(2**30).values()) / 2**30) < 0.4
    assert 16 <= lora / num_of_lora < 16.1
