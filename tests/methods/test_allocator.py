"""The allocator on one process: budget, freezing, skipped and missing gradients, what goes wrong and is said."""

import itertools
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from adalora_dist.io.errors import UserError
from adalora_dist.methods.hooks import attach
from tests.support.limits import HANG_SECONDS
from tests.support.models import adapted_net, config, global_batch
from tests.support.ranks import run_ranks

STEPS = 30


def train(model, hooks, optimizer, steps=range(STEPS), micro_steps=1, before_step=None, loss_scale=1.0):
    losses = []
    for step in steps:
        x, y = global_batch(step)
        optimizer.zero_grad()
        total = 0.0
        for part_x, part_y in zip(x.chunk(micro_steps), y.chunk(micro_steps), strict=True):
            loss = (model(part_x) - part_y).square().mean() / micro_steps * loss_scale
            loss.backward()
            total += loss.item()
        if before_step:
            before_step(step)
        optimizer.step()
        losses.append(total)
    return losses


def attached(settings=None, total_steps=STEPS, seed=0, optimizer=torch.optim.AdamW, **options):
    settings = settings or config()
    model = adapted_net(settings, seed)
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=2e-2, **options)
    return model, attach(model, optimizer, settings, total_steps), optimizer


def active(model):
    return int((model.adalora.lam != 0).sum())


def test_budget_follows_the_schedule_and_is_met_exactly():
    model, hooks, optimizer = attached()
    assert hooks.method_step.schedule.initial_budget == 12 and hooks.method_step.schedule.target_budget == 6
    losses = train(model, hooks, optimizer)
    hooks.finish()
    assert [a.step for a in hooks.method_step.allocations] == [6, 9, 12, 15, 18]
    assert [int(a.keep.sum()) for a in hooks.method_step.allocations] == [
        a.budget for a in hooks.method_step.allocations
    ]
    assert (
        hooks.method_step.allocations[-1].budget == 6 == active(model) == sum(hooks.method_step.rank_pattern().values())
    )
    assert losses[-1] < losses[0]


def test_pruned_triplets_keep_their_vectors_until_the_pattern_freezes_and_then_have_no_gradient():
    model, hooks, optimizer = attached(weight_decay=0.1)
    train(model, hooks, optimizer, range(18))
    for matrix, kept in zip(
        hooks.method_step.layers, hooks.method_step.keep.split(hooks.method_step.ranks), strict=True
    ):
        assert (matrix.P != 0).all() and not kept.all()
    train(model, hooks, optimizer, range(18, 19))
    assert hooks.method_step.frozen
    zero = [layer.lam == 0 for layer in hooks.method_step.layers]
    train(model, hooks, optimizer, range(19, STEPS))
    x, y = global_batch(STEPS)
    (model(x) - y).square().mean().backward()
    for matrix, pruned in zip(hooks.method_step.layers, zero, strict=True):
        layer = matrix
        assert torch.equal(layer.lam == 0, pruned) and torch.equal((layer.P == 0).all(dim=0), pruned)
        of_lam = model.adalora.lam.grad[layer.first : layer.first + layer.rank]
        for gradient in (layer.P.grad, of_lam, layer.Qt.grad):
            assert (gradient[..., pruned] == 0).all() and (gradient[..., ~pruned] != 0).all()


def test_a_triplet_can_return_before_the_pattern_freezes():
    model, hooks, optimizer = attached(config(mask_interval_steps=4, final_steps=2, target_rank=1))
    train(model, hooks, optimizer, range(9))
    lost = ~hooks.method_step.keep
    assert lost.any()
    lams = [m.lam for m in hooks.method_step.layers]
    assert all((lam[part] == 0).all() for lam, part in zip(lams, lost.split(hooks.method_step.ranks), strict=True))
    train(model, hooks, optimizer, range(9, 11))
    grown = torch.cat([lam != 0 for lam in lams])
    assert (grown & lost).any(), "between selections lambda must be free to grow"


def test_budget_equal_to_the_initial_one_and_budget_zero():
    model, hooks, optimizer = attached(config(target_rank=3))
    train(model, hooks, optimizer)
    hooks.finish()
    assert active(model) == 12
    model, hooks, optimizer = attached(config(target_rank=0))
    train(model, hooks, optimizer)
    hooks.finish()
    assert active(model) == 0


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize(
    ("importance", "order"),
    [
        *itertools.product(["sensitivity_uncertainty", "sensitivity"], ["before", "after"]),
        ("magnitude", "before"),  # which averages nothing
    ],
)
def test_every_variant_meets_its_budget(importance, scope, order):
    settings = config(importance=importance, budget_scope=scope, importance_order=order, budget_schedule="linear")
    model, hooks, optimizer = attached(settings)
    train(model, hooks, optimizer)
    hooks.finish()
    assert active(model) == 6
    if scope == "local":
        assert sorted(hooks.method_step.rank_pattern().values()) == [1, 1, 2, 2]


def test_accumulation_changes_nothing():
    runs = []
    for micro_steps in (1, 4):
        model, hooks, optimizer = attached()
        losses = train(model, hooks, optimizer, micro_steps=micro_steps)
        runs.append((losses, [a.keep for a in hooks.method_step.allocations]))
    torch.testing.assert_close(torch.tensor(runs[0][0]), torch.tensor(runs[1][0]), rtol=1e-5, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def patterns_with(rank: int, world_size: int, kernel: str) -> torch.Tensor:
    model, hooks, optimizer = attached(config(importance_kernel=kernel))
    train(model, hooks, optimizer)
    hooks.finish()
    return torch.stack([a.keep for a in hooks.method_step.allocations])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_importance_leads_to_the_same_patterns():
    [eager], [compiled] = (run_ranks(1, patterns_with, kernel) for kernel in ("eager", "compiled"))
    assert torch.equal(eager, compiled) and len(eager.unique(dim=0)) > 1


def test_a_kernel_that_cannot_be_compiled_is_an_error(monkeypatch):
    def fail():
        raise RuntimeError("no compiler here\nand many more lines")

    monkeypatch.setattr("adalora_dist.methods.adalora.importance.compiled_advance", fail)
    model, hooks, optimizer = attached(config(importance_kernel="compiled"))
    with pytest.raises(UserError, match=r"cannot build it \(no compiler here\): .* set importance_kernel to eager"):
        train(model, hooks, optimizer, range(1))
    hooks.detach()


def test_orthogonality_gradient_is_that_of_the_loss_term():
    """One SGD step with the closed form equals one with the regulariser inside the loss."""
    from adalora_dist.methods.adalora.orthogonality import regulariser

    for form in ("norm", "squared"):
        model, hooks, optimizer = attached(config(orthogonality_form=form), optimizer=torch.optim.SGD)
        control = adapted_net(config())
        reference = torch.optim.SGD([p for p in control.parameters() if p.requires_grad], lr=2e-2)
        x, y = global_batch(0)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        factors = [getattr(m, kind) for m in control.modules() if hasattr(m, "Qt") for kind in ("P", "Qt")]
        ((control(x) - y).square().mean() + regulariser(factors, form, 0.1)).backward()
        reference.step()
        for (name, a), (_, b) in zip(model.named_parameters(), control.named_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


def test_missing_gradients_are_zero():
    model, hooks, optimizer = attached()

    def drop(step):
        for p in model.blocks[1].parameters():
            p.grad = None

    train(model, hooks, optimizer, before_step=lambda step: drop(step) if step == 3 else None)
    hooks.finish()
    assert active(model) == 6


@pytest.mark.parametrize("fused", [False, True])
def test_a_nonfinite_gradient_leaves_weights_moments_and_importance_untouched(fused):
    """Fused AdamW leaves the step out on the device, the other on the host's word; steps 4 and 5, nothing selected."""
    model, hooks, optimizer = attached(fused=fused)
    train(model, hooks, optimizer, range(4))

    def everything():
        states = [s[key].clone() for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq", "step")]
        averages = [hooks.method_step.bound.sensitivity.clone(), hooks.method_step.bound.uncertainty.clone()]
        return [p.detach().clone() for p in model.parameters()], states, averages

    def poison(step):
        model.adalora.lam.grad[0] = float("nan" if step % 2 else "inf")

    before = everything()
    train(model, hooks, optimizer, range(4, 6), before_step=poison)
    for kept, now in zip(before, everything(), strict=True):
        assert len(kept) == len(now) > 0 and all(map(torch.equal, kept, now))
    assert hooks.num_skipped_steps == 2 and hooks.step == 6
    # The selection of step 6 is made there all the same, from the importance of the last step that happened.
    train(model, hooks, optimizer, range(6, 7), before_step=poison)
    assert torch.equal(hooks.method_step.bound.sensitivity, before[2][0]) and hooks.method_step.allocations[0].step == 6
    assert [v != 0 for m in hooks.method_step.layers for v in m.lam.tolist()] == hooks.method_step.keep.tolist()
    train(model, hooks, optimizer, range(7, STEPS))
    hooks.finish()
    assert hooks.num_skipped_steps == 3 and active(model) == 6


def test_nonfinite_gradients_through_the_freeze_step_still_meet_the_budget():
    model, hooks, optimizer = attached()

    def poison(step):
        if 10 <= step <= 20:
            model.blocks[0].up.P.grad.fill_(float("nan"))

    train(model, hooks, optimizer, before_step=poison)
    hooks.finish()
    assert active(model) == 6 and hooks.method_step.allocations[-1].step == 18


def test_fused_and_plain_adamw_select_the_same_triplets():
    patterns = []
    for fused in (False, True):
        model, hooks, optimizer = attached(fused=fused)
        train(model, hooks, optimizer)
        hooks.finish()
        patterns.append([a.keep.tolist() for a in hooks.method_step.allocations])
    assert patterns[0] == patterns[1] and len(patterns[0]) == 5


def test_steps_that_an_engine_skipped_itself_are_caught_up():
    model, hooks, optimizer = attached()
    train(model, hooks, optimizer, range(17))
    hooks.catch_up(22)  # five overflows that never reached the optimizer, the freeze step among them
    assert hooks.step == 22 and hooks.num_skipped_steps == 5
    train(model, hooks, optimizer, range(22, STEPS))
    hooks.finish()
    assert active(model) == 6


def test_a_run_that_misses_its_budget_is_an_error():
    model, hooks, optimizer = attached(total_steps=STEPS * 2)
    train(model, hooks, optimizer)
    with pytest.raises(RuntimeError, match="budget was not reached.*the target is 6"):
        hooks.finish()


def test_an_allocator_on_the_wrong_optimizer_is_an_error():
    model, hooks, _ = attached()
    other = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    train(model, hooks, other, range(2))
    with pytest.raises(RuntimeError, match="never stepped"):
        hooks.catch_up(33)
    with pytest.raises(RuntimeError, match="never called"):
        hooks.finish()


def test_a_plain_loop_that_never_asks_is_told_at_exit():
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from tests.methods.test_allocator import attached, train\n"
        "model, hooks, optimizer = attached(total_steps=60); train(model, hooks, optimizer)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0 and "budget was not reached" in done.stderr


def test_optimizer_without_the_adapters_is_refused():
    settings = config()
    model = adapted_net(settings)
    head = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    hooks = attach(model, optimizer, settings, STEPS)
    hooks.detach()
    head(torch.ones(1, 3)).sum().backward()
    with pytest.raises(UserError, match="not in the optimizer"):
        optimizer.step()


def test_attach_without_adapters_and_with_an_impossible_schedule():
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match="no adapters"):
        attach(model, optimizer, config(), 10)
    with pytest.raises(UserError, match="must be less than"):
        attached(total_steps=16)


def test_state_is_eight_bytes_per_element():
    model, hooks, optimizer = attached()
    train(model, hooks, optimizer, range(1))
    elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = sum(
        t.numel() * t.element_size() for t in (hooks.method_step.bound.sensitivity, hooks.method_step.bound.uncertainty)
    )
    assert size == 8 * elements
