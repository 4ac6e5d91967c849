"""GaLore: the projection's algebra, its published algorithm, and the same run on every engine."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from adalora_dist.artifacts.checkpoints.content import load_checkpoint
from adalora_dist.artifacts.checkpoints.writer import CheckpointWriter, checkpoint_at
from adalora_dist.config.methods import GaLoreConfig
from adalora_dist.config.sections import TrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods import method_for
from adalora_dist.methods.galore.projection import (
    gram,
    is_exact,
    leading,
    left_of,
    project,
    project_back,
    randomised_right,
    side_of,
)
from adalora_dist.methods.galore.rows import Rows, cut_rows
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.protocol import trained_parameters
from adalora_dist.sharding.spans import Span
from tests.support.engine_steps import backward_and_step, shard_blocks, wrapped
from tests.support.models import Net, global_batch
from tests.support.ranks import import_deepspeed, run_ranks

deepspeed = import_deepspeed()

STEPS, STOP, REFRESH, GLOBAL_BATCH, LR = 40, 20, 15, 24, 1e-2
"""Three choices of P (steps 0, 15 and 30); a checkpoint between two of them."""


def settings(**changes: Any) -> GaLoreConfig:
    values = {"init_rank": 3, "targets": ("up", "down"), "refresh_every_steps": REFRESH, "update_scale": 0.5}
    return GaLoreConfig(**{**values, **changes})


# ---------------------------------------------------------------------------------------------------- the mathematics


def of_rank(rank: int, m: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank + m)
    return torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator)


def test_the_length_of_the_projected_side_decides_whether_auto_is_exact() -> None:
    """LLaMA's down_proj on the right would have a Gram matrix of 11,008^2."""
    for shape, side, expected in (((4096, 11008), "left", True), ((4096, 11008), "right", False),
                                  ((11008, 4096), "right", True), ((11008, 4096), "left", False)):  # fmt: skip
        assert is_exact("auto", shape, side) is expected
        assert is_exact("exact", shape, side) and not is_exact("randomised", shape, side)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_a_full_projection_takes_nothing_away_and_a_low_one_only_what_is_not_there(shape: tuple[int, int]) -> None:
    side = side_of(shape, "std")
    assert side == ("left" if shape[0] < shape[1] else "right")
    gradient, weight = of_rank(6, *shape) + of_rank(3, *shape), torch.randn(shape)
    full = leading(gram(gradient, side), min(shape)).float()
    back = project_back(project(gradient, full, side), full, side)
    torch.testing.assert_close(weight - 0.1 * back, weight - 0.1 * gradient)  # SGD on R is SGD
    low = of_rank(3, *shape)
    for p in (leading(gram(low, side), 3).float(), randomised(low, side, 3)):
        torch.testing.assert_close(p.T @ p, torch.eye(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(project_back(project(low, p, side), p, side), low, atol=2e-5, rtol=0)


def randomised(gradient: torch.Tensor, side: str, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    v = randomised_right(lambda z: gradient.T @ (gradient @ z), gradient.shape[1], rank, generator)
    return v if side == "right" else left_of(gradient @ v)


def test_the_randomised_projection_is_that_of_the_leading_vectors() -> None:
    u, s, vt = torch.linalg.svd(torch.randn(40, 24, generator=torch.Generator().manual_seed(3)), full_matrices=False)
    s = 2.0 ** -torch.arange(24.0)
    gradient = u * s @ vt
    exact, fast = leading(gram(gradient, "right"), 4).float(), randomised(gradient, "right", 4)
    torch.testing.assert_close(fast, exact, atol=1e-4, rtol=0)  # signs, too
    torch.testing.assert_close(exact.abs(), vt[:4].T.abs(), atol=1e-4, rtol=0)


def test_any_partition_of_a_matrix_adds_up() -> None:
    shape, generator = (11, 6), torch.Generator().manual_seed(5)
    gradient, p = torch.randn(shape, generator=generator), torch.randn(6, 2, generator=generator)
    for _ in range(200):
        borders = sorted(torch.randint(0, 67, (4,), generator=generator).tolist())
        spans = [Span(a, b) for a, b in zip([0, *borders], [*borders, 66], strict=True)]
        cut = cut_rows(shape, spans)
        parts = [(Rows(shape, span, cut), gradient.flatten()[span.start : span.stop]) for span in spans]
        whole, sums = torch.zeros(11, 2), torch.zeros(len(cut), 6)
        for rows, local in parts:
            block = rows.block(local)
            assert torch.equal(rows.part(block), local)
            whole[rows.first : rows.stop] += project(block, p, "right")
            for place, slot in rows.own_cut:
                sums[slot] += block[place]
        torch.testing.assert_close(whole, gradient @ p)
        total = sum(gram(rows.complete(rows.block(local), sums), "right") for rows, local in parts)
        torch.testing.assert_close(total, gram(gradient, "right"))


# ------------------------------------------------------------------------------------------------- one process, by hand


class ByHand:
    """The paper's Algorithm 2 over one matrix, written once more: its own SVD, and Adam with corrected averages."""

    def __init__(self, weight: torch.Tensor, config: GaLoreConfig) -> None:
        self.weight, self.config, self.step = weight.detach().clone(), config, 0

    def update(self, gradient: torch.Tensor) -> None:
        config, right = self.config, gradient.shape[0] >= gradient.shape[1]
        if self.step % config.refresh_every_steps == 0:
            u, _, vt = torch.linalg.svd(gradient.double(), full_matrices=False)
            vectors = (vt.T if right else u)[:, : config.init_rank]
            signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
            self.p = (vectors * signs).float()
        reduced = gradient @ self.p if right else self.p.T @ gradient
        if self.step == 0:
            self.m, self.v = torch.zeros_like(reduced), torch.zeros_like(reduced)
        self.step += 1
        self.m, self.v = 0.9 * self.m + 0.1 * reduced, 0.999 * self.v + 0.001 * reduced**2
        direction = self.m / (1 - 0.9**self.step) / ((self.v / (1 - 0.999**self.step)).sqrt() + 1e-8)
        back = direction @ self.p.T if right else self.p @ direction
        self.weight -= LR * config.update_scale * back


def ready_for_ten_steps(config: GaLoreConfig) -> tuple[Net, torch.optim.Optimizer, Net]:
    """A model with GaLore's optimizer, and a plain copy of it."""
    torch.manual_seed(1)
    model = Net()
    adapt(model, config)
    optimizer = method_for(config).optimizer(model, TrainConfig(learning_rate=LR))
    attach(model, optimizer, config, 10)
    copy = Net()
    copy.load_state_dict(model.state_dict())
    return model, optimizer, copy


def ten_steps_are_the_papers(rank: int, world_size: int) -> None:
    # (Gradients of the last block have rank 3. Of what has no gradient, Adam would magnify the rounding errors.)
    for changes in ({}, {"init_rank": 1}, {"refresh_every_steps": 4, "init_rank": 2}):
        config = settings(**changes)
        model, optimizer, others = ready_for_ten_steps(config)
        plain = torch.optim.AdamW([*others.head.parameters(), *(b for b in _biases(others))], LR, weight_decay=0)
        matrices = {name: ByHand(m.weight, config) for name, m in _linears(others)}
        for step in range(10):
            x, y = global_batch(step, GLOBAL_BATCH)
            for net in (model, others):
                (net(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, module in _linears(others):
                matrices[name].update(module.weight.grad)
                module.weight.data.copy_(matrices[name].weight)
            plain.step()
            others.zero_grad()
            for name, p in others.named_parameters():
                torch.testing.assert_close(model.get_parameter(name), p, atol=2e-6, rtol=1e-5, msg=f"{name} {step}")


def _linears(model: Net) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.blocks.named_modules() if isinstance(module, nn.Linear)]


def _biases(model: Net) -> list[nn.Parameter]:
    return [module.bias for _, module in _linears(model)]


def ten_steps_are_those_of_galore_torch(rank: int, world_size: int) -> None:
    from galore_torch import GaLoreAdamW

    # Without a second choice of P: the averages stay, so from then on the signs of its columns count, those of LAPACK
    # there and of one rule here.
    for changes in ({}, {"init_rank": 1}, {"projection": "right"}, {"projection": "left"}):
        config = settings(**changes)
        model, optimizer, theirs = ready_for_ten_steps(config)
        projected = [module.weight for _, module in _linears(theirs)]
        sizes = {"rank": config.init_rank, "update_proj_gap": config.refresh_every_steps}
        options = {**sizes, "scale": config.update_scale, "proj_type": config.projection}
        groups = [{"params": [*theirs.head.parameters(), *_biases(theirs)]}, {"params": projected, **options}]
        # Theirs adds eps before the averages are corrected, as AdamW of transformers did: a tiny one hides that.
        published = GaLoreAdamW(groups, lr=LR, eps=1e-15, weight_decay=0.0)
        for group in optimizer.param_groups:
            group["eps"] = 1e-15
        for step in range(10):
            x, y = global_batch(step, GLOBAL_BATCH)
            for net, own in ((model, optimizer), (theirs, published)):
                (net(x) - y).square().mean().backward()
                own.step()
                own.zero_grad()
            for name, p in theirs.named_parameters():
                torch.testing.assert_close(model.get_parameter(name), p, atol=2e-6, rtol=1e-5, msg=f"{name} {step}")


@pytest.mark.parametrize("steps", [ten_steps_are_the_papers, ten_steps_are_those_of_galore_torch])
def test_ten_steps_on_one_process(steps: Callable[[int, int], None]) -> None:
    run_ranks(1, steps)


# ------------------------------------------------------------------------------------------------------------- engines


def run(
    rank: int,
    world_size: int,
    engine: str,
    config: GaLoreConfig,
    save: Path | None = None,
    resume: Path | None = None,
    poison: tuple[int, ...] = (),
) -> tuple[list[float], list[int], int]:
    """Losses of the steps made, collectives of the method in each, bytes that it keeps here."""
    torch.manual_seed(0)
    model: Any = Net()
    adapt(model, config, seed=3)
    if engine == "fsdp2":
        shard_blocks(model)
    train = TrainConfig(learning_rate=LR, weight_decay=0.1)
    optimizer = method_for(config).optimizer(model, train)
    hooks = attach(model, optimizer, config, STEPS)
    plain = model
    model, around = wrapped(engine, model, optimizer, GLOBAL_BATCH // world_size)
    parameters = trained_parameters(plain)
    hooks.bind(around)
    first = 0
    if resume is not None:
        checkpoint = checkpoint_at(resume)
        load_checkpoint(checkpoint, parameters, around, hooks)
        first = checkpoint.step
    losses, collectives = [], []
    for step in range(first, STEPS):
        x, y = (t.chunk(world_size)[rank] for t in global_batch(step, GLOBAL_BATCH))
        loss = (model(x) - y).square().mean() * (float("nan") if step in poison else 1.0)
        with pytest.MonkeyPatch.context() as patch:
            count = counted(patch)
            backward_and_step(engine, model, optimizer, loss)
        collectives.append(count[0])
        mean = loss.detach() / world_size
        dist.all_reduce(mean)
        losses.append(mean.item())
        if save is not None and step + 1 == STOP:
            CheckpointWriter(save, 1).save(STOP, parameters, around, hooks, {})
    hooks.finish()
    return losses, collectives, sum(tensor.nbytes for tensor in hooks.method_step.buffers())


def counted(patch: pytest.MonkeyPatch) -> list[int]:
    """How many sums GaLore makes, from now on."""
    from adalora_dist.methods.galore import step

    count, original = [0], step.sum_over

    def counting(group: Any, tensor: torch.Tensor) -> torch.Tensor:
        count[0] += group is not None
        return original(group, tensor)

    patch.setattr(step, "sum_over", counting)
    return count


@functools.cache
def alone(projector: str = "exact", projection: str = "std") -> list[float]:
    [(losses, _, _)] = run_ranks(1, run, "single", settings(projector=projector, projection=projection))
    return losses


@pytest.mark.parametrize(
    "engine, world_size",
    [
        *(("fsdp2", 2), ("zero3", 2)),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in (("ddp", 2), ("fsdp2", 3), ("zero2", 2))),
    ],
)
def test_losses_are_those_of_one_process(engine: str, world_size: int) -> None:
    assert alone()[-1] < 0.8 * alone()[0]
    for losses, collectives, _ in run_ranks(world_size, run, engine, settings()):
        assert losses == pytest.approx(alone(), rel=1e-5)
        # Two of four matrices are projected on the left, and take part in the one sum of every step.
        plain = collectives[1]
        assert plain == (0 if engine == "ddp" else 1)
        assert [step for step, count in enumerate(collectives) if count != plain] == (
            [] if engine == "ddp" else [0, 15, 30]
        )


@pytest.mark.slow
@pytest.mark.parametrize("engine, world_size", [("zero1", 2), ("zero2", 3), ("zero3", 3), ("fsdp2", 3)])
@pytest.mark.parametrize("projection", ["right", "left", "std"])
@pytest.mark.parametrize("projector", ["exact", "randomised"])
def test_every_projection_on_every_engine(engine: str, world_size: int, projection: str, projector: str) -> None:
    config = settings(projection=projection, projector=projector)
    for losses, collectives, _ in run_ranks(world_size, run, engine, config):
        assert losses == pytest.approx(alone(projector, projection), rel=1e-5)
        if engine == "fsdp2" and projection == "right":
            assert collectives[1] == 0  # nothing between two refreshes


def test_a_run_goes_on_elsewhere_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    for start, then in (("fsdp2", "fsdp2"), ("zero3", "ddp"), ("fsdp2", "zero2"), ("zero2", "fsdp2")):
        folder = tmp_path / f"{start}-{then}"
        whole = run_ranks(2, run, start, settings(), folder)
        [checkpoint] = folder.glob("step-*")
        for (losses, _, _), (unbroken, _, _) in zip(
            run_ranks(2, run, then, settings(), None, checkpoint), whole, strict=True
        ):
            assert losses == (unbroken[STOP:] if start == then else pytest.approx(alone()[STOP:], rel=1e-5))


def test_a_step_without_finite_gradients_is_left_out_and_its_refresh_made_up_for() -> None:
    [(losses, _, _)] = run_ranks(1, run, "single", settings(), None, None, (0, 15))
    finite = [loss for step, loss in enumerate(losses) if step not in (0, 15)]
    assert all(loss == loss for loss in finite) and finite[-1] < 0.8 * finite[0]


def test_the_state_has_the_size_of_the_formula() -> None:
    [(_, _, num_bytes)] = run_ranks(1, run, "single", settings())
    shapes = [(13, 7), (7, 13)] * 2
    expected = 4 * sum(min(shape) * 3 + 2 * max(shape) * 3 for shape in shapes)
    assert num_bytes <= 1.02 * expected


# ------------------------------------------------------------------------------------------------------------ refusals


def test_refusals() -> None:
    model, config = Net(), settings()
    with pytest.raises(UserError, match=r"no matrix of the model is marked: call adapt"):
        attach(model, torch.optim.AdamW(model.parameters()), config, 3)
    adapt(model, config)
    with pytest.raises(UserError, match=r"method=galore with AdamW.*use GaLore's own optimizer, ProjectedAdamW"):
        attach(model, torch.optim.AdamW(model.parameters()), config, 3)
    with pytest.raises(UserError, match=r"method=galore: .* is torch.bfloat16.*set dtype to float32"):
        adapt(Net().bfloat16(), config)
