"""DyLoRA: LoRA at every rank, a draw that is the same for whoever asks, and columns that stand still."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from adalora_dist.config.methods import DyloraConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.branch import drawn_number
from adalora_dist.methods.dylora import Dylora, DyloraLinear, at_rank
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt, parameter_groups
from tests.support.models import Net, global_batch

TOKENS, D_IN, D_OUT, RANK = 31, 12, 20, 4


def config(**changes: Any) -> DyloraConfig:
    return DyloraConfig(**{"targets": ("up", "down"), "init_rank": RANK, "alpha": 6.0, **changes})


def layer(**changes: Any) -> DyloraLinear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D_IN, D_OUT))
    adapt(model, config(targets=("0",), **changes))
    own: Any = model[0].double()
    nn.init.normal_(own.P)
    return own


def take(own: DyloraLinear, rank: int) -> None:
    step = next(step for step in itertools.count() if drawn_number(own.ranks.seed, step, 1, RANK) == rank)
    own.ranks.draw(step)
    assert own.ranks.now == rank


def update_of(own: DyloraLinear) -> Any:
    parts = {name: p.detach() for name, p in own.trained().items()}
    [update] = Dylora.updates({own.name: own.description()}, {}, None, parts.get)
    return update


@pytest.mark.parametrize("rank", range(1, RANK + 1))
def test_each_rank_is_a_lora_of_its_own(rank: int) -> None:
    """What is multiplied by 0 is what is cut off; gradients reach the first b columns; exports cut."""
    own, x = layer(), torch.randn(TOKENS, D_IN, dtype=torch.float64)
    own.train()
    own(x)  # what it has made for one rank must not stay for the next
    take(own, rank)
    y = own(x)
    branch = x @ own.Qt[:, :rank] @ own.P[:, :rank].T
    torch.testing.assert_close(y, own.base(x) + 6.0 / rank * branch, rtol=0, atol=1e-12)
    y.square().sum().backward()
    for p in (own.P, own.Qt):
        assert p.grad is not None and p.grad[:, :rank].abs().min() > 0 and not p.grad[:, rank:].any()
    [cut] = at_rank([update_of(own)], rank)
    merged = cut.merged(own.base.weight.detach().clone())
    torch.testing.assert_close(nn.functional.linear(x, merged, own.base.bias), y, rtol=0, atol=1e-12)
    assert cut.as_lora().rank == rank == cut.rank
    own.eval()
    torch.testing.assert_close(own(x), own.base(x) + 6.0 / RANK * x @ own.Qt @ own.P.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", ["algorithm", "authors"])
def test_frozen_gradients_reach_one_column(frozen: str) -> None:
    own, x = layer(frozen=frozen), torch.randn(TOKENS, D_IN, dtype=torch.float64)
    own.train()
    take(own, 3)
    y = own(x)
    branch = x @ own.Qt[:, :3] @ own.P[:, :3].T
    torch.testing.assert_close(y, own.base(x) + 6.0 / 3 * branch, rtol=0, atol=1e-12)
    y.square().sum().backward()
    for p in (own.P, own.Qt):
        assert p.grad is not None and [bool(column.any()) for column in p.grad.T] == [False, False, True, False]


def trained(frozen: str, steps: int = 50) -> list[tuple[int, list[list[bool]]]]:
    """Per step the drawn rank, and of every column whether its values and its moments stayed bit for bit."""
    torch.manual_seed(0)
    model, settings = Net(), config(frozen=frozen)
    adapt(model, settings, seed=3)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings, 1e-2), weight_decay=0.1)
    hooks = attach(model, optimizer, settings, steps)
    ranks = model.blocks[0].up.ranks  # type: ignore[union-attr]
    parameters = [p for p in model.parameters() if p.requires_grad]
    found, before = [], None
    for step in range(steps):
        x, y = global_batch(step)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        rank = ranks.now
        optimizer.step()
        kinds = ("exp_avg", "exp_avg_sq")
        now = [t.detach().clone() for p in parameters for t in (p, *(optimizer.state[p][kind] for kind in kinds))]
        if before is not None:
            stays = [[torch.equal(a[:, k], b[:, k]) for k in range(RANK)] for a, b in zip(now, before, strict=True)]
            found.append((rank, stays))
        before = now
    hooks.finish()
    return found


def test_as_in_algorithm_1_all_but_one_column_stand_still() -> None:
    """Their moments, too, through 50 steps of AdamW with weight decay; as the authors have it they move."""
    found = trained("algorithm")
    assert {rank for rank, _ in found} == {1, 2, 3, 4}
    for rank, stays in found:
        assert all(stay[k] for stay in stays for k in range(RANK) if k != rank - 1)
        assert not any(stay[rank - 1] for stay in stays[::3]), "the drawn column's values move"
    theirs = trained("authors", 20)
    assert not any(any(stay) for _, stays in theirs[-3:] for stay in stays), "all were drawn before, and all move"


def test_the_draw_is_uniform_and_a_matter_of_seed_and_step_alone() -> None:
    counts = Counter(drawn_number(5, step, 2, 5) for step in range(4000))
    assert sorted(counts) == [2, 3, 4, 5] and all(900 < count < 1100 for count in counts.values())
    assert [drawn_number(7, step, 1, 8) for step in range(6)] == [drawn_number(7, step, 1, 8) for step in range(6)]
    assert [drawn_number(7, step, 1, 8) for step in range(9)] != [drawn_number(8, step, 1, 8) for step in range(9)]


def test_a_step_draws_once_whatever_happens_in_between() -> None:
    model = Net()
    adapt(model, config(), seed=3)
    ranks: Any = model.blocks[0].up.ranks  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    hooks = attach(model, optimizer, config(), 20)

    def expected(step: int) -> int:
        return drawn_number(ranks.seed, step, 1, RANK)

    x, y = global_batch(0)
    assert ranks.now == expected(0) and ranks is model.blocks[1].down.ranks  # type: ignore[union-attr]
    for _ in range(3):  # micro-batches
        (model(x) - y).square().mean().backward()
        assert ranks.now == expected(0)
    optimizer.step()
    assert ranks.now == expected(1)
    hooks.catch_up(6)  # an engine has left out five
    assert ranks.now == expected(6)
    hooks.load_state(hooks.state()._replace(numbers=hooks.state().numbers | {"step": 11}))
    assert ranks.now == expected(11)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="min_rank 5 with init_rank 4"):
        config(min_rank=5)
    update = update_of(layer())
    with pytest.raises(UserError, match="--rank 5: must be from 1 to 4"):
        at_rank([update], 5)
    with pytest.raises(UserError, match="use --max-rank 2 --fold"):
        at_rank([update.as_lora()], 2)
