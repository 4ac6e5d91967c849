"""Adapters of a block as one parameter: names, values and messages are those of the parts, on every engine.

Losses, ranks and compaction beside one process: ``test_parity.py`` and ``test_compaction.py``, cases "packed".
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, FunnelForSequenceClassification

from adalora_dist import UserError, adapt, attach, pack_adapters, parameter_groups
from adalora_dist.backbones.load import name_blocks
from adalora_dist.methods.protocol import adapters_of, others_trained, trained_parameters
from adalora_dist.methods.shares import weight_shares
from adalora_dist.sharding import select_engine
from adalora_dist.sharding.base import Shrink
from adalora_dist.sharding.packing import pack_of, packs_of
from adalora_dist.sharding.shrink import shrink_parameters
from adalora_dist.sharding.tensors import held_parts, is_whole, local_elements, local_part, whole_tensor
from adalora_dist.training.faults.nonfinite import _bad_weight
from tests.support.engine_steps import backward_and_step, wrapped
from tests.support.models import adapted_net, config, global_batch
from tests.support.ranks import run_ranks
from tests.support.recipe_runs import run_command
from tests.support.tiny_any import tiny_model
from tests.support.tiny_language_model import tiny_llama

SETTINGS = config()


def packed_net(settings: Any = SETTINGS) -> Any:
    model = adapted_net(settings)
    assert pack_adapters(model, settings) == 8
    return model


def test_the_model_has_one_parameter_a_block_and_the_names_that_it_had() -> None:
    plain, model = adapted_net(SETTINGS), packed_net()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 1 + len(model.blocks)  # lambda and a flat one for each
    expected, found = trained_parameters(plain), trained_parameters(model)
    assert {name: p.shape for name, p in found.items()} == {name: p.shape for name, p in expected.items()}
    assert not list(others_trained(model)), "the flat parameters are adapters"
    assert weight_shares(model) == weight_shares(plain)
    for mine, theirs in zip(adapters_of(model), adapters_of(plain), strict=True):
        assert list(mine.trained()) == list(theirs.trained()) and mine.part_size == theirs.part_size
    for name, part in found.items():
        torch.testing.assert_close(whole_tensor(part), expected[name].detach(), rtol=0, atol=0)


def test_a_forward_and_its_gradients_are_those_of_the_parts() -> None:
    plain, model = adapted_net(SETTINGS), packed_net()
    for net in (plain, model):
        nn.init.ones_(net.adalora.lam)
        net(global_batch(0)[0]).square().sum().backward()
    for name, part in trained_parameters(model).items():
        pack, expected = pack_of(part), trained_parameters(plain)[name].grad
        assert expected is not None
        found = part.grad if pack is None else pack.flat.grad.narrow(0, pack.start(part), part.numel())  # type: ignore[union-attr]
        torch.testing.assert_close(found.view(expected.shape), expected)  # type: ignore[union-attr]


def test_lora_plus_keeps_its_two_rates() -> None:
    settings = config("lora", lora_plus_ratio=4.0, init_rank=3)
    model = adapted_net(settings)
    expected = [sum(p.numel() for p in group["params"]) for group in parameter_groups(model, settings, 1e-3)]
    assert pack_adapters(model, settings) == 8
    groups = parameter_groups(model, settings, 1e-3)
    assert [group["lr_ratio"] for group in groups] == [1.0, 4.0]
    assert [sum(p.numel() for p in group["params"]) for group in groups] == expected
    assert all(len(group["params"]) == len(model.blocks) for group in groups)


def test_other_methods_and_models_without_blocks_stay_as_they_are() -> None:
    for settings in (config("adadora"), config("dora")):
        assert pack_adapters(adapted_net(settings), settings) == 0
    model = adapted_net(SETTINGS)
    model._no_split_modules = None
    assert pack_adapters(model, SETTINGS) == 0


def test_an_optimizer_that_looks_at_whole_parameters_is_refused() -> None:
    model = packed_net()
    optimizer = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(UserError, match="Adafactor may not step every weight by itself"):
        attach(model, optimizer, SETTINGS, 30)


def test_a_part_computed_outside_of_its_block_is_one_line() -> None:
    model = packed_net()
    with pytest.raises(UserError, match=r"blocks.0.up is computed outside of the forward of Block.* pack_adapters"):
        model.blocks[0].up(torch.zeros(1, 7))
    model(torch.zeros(1, 7))


def test_what_is_computed_without_gradients_first_keeps_none_from_the_rest() -> None:
    """As where a model looks at a layer under no_grad before it calls it."""
    model = packed_net()
    nn.init.ones_(model.adalora.lam)
    block, up = model.blocks[0], model.blocks[0].up

    def forward(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            up(x)
        return up(x)

    block.forward = forward
    block(torch.ones(1, 7)).sum().backward()
    flat = pack_of(trained_parameters(model)["blocks.0.up.Qt"]).flat  # type: ignore[union-attr]
    assert flat.grad is not None and flat.grad.any()


def test_after_a_forward_that_failed_parts_stand_for_themselves_again() -> None:
    model = packed_net()
    with pytest.raises(RuntimeError):
        model.blocks[0](torch.zeros(1, 8))
    assert model.blocks[0].up.P.is_meta and model(torch.zeros(1, 7)).isfinite().all()


def test_a_copy_is_a_model_of_its_own() -> None:
    model = packed_net()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    fresh = packed_net()
    for name, part in trained_parameters(other).items():
        assert torch.equal(whole_tensor(part), whole_tensor(trained_parameters(fresh)[name])), name
    assert torch.equal(other(global_batch(0)[0]), fresh(global_batch(0)[0]))


def test_what_is_saved_is_that_of_the_parts(tmp_path: Path) -> None:
    saved = []
    for packs in (False, True):
        model = tiny_llama(40)
        model.save_pretrained(tmp_path / "base")
        settings = config(targets=("all-linear",))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        adapt(model, settings)
        nn.init.ones_(model.adalora.lam)
        assert not packs or pack_adapters(model, settings) == 2 * 7 * len(model.model.layers)
        model.save_pretrained(tmp_path / f"adapter {packs}")
        saved.append(load_file(tmp_path / f"adapter {packs}" / "adapter_model.safetensors"))
    assert saved[0].keys() == saved[1].keys() and len(saved[0]) > 10
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_a_weight_that_is_not_finite_has_the_name_of_its_part() -> None:
    model = packed_net()
    part = trained_parameters(model)["blocks.1.down.Qt"]
    local_elements(part)[0][4] = float("nan")
    assert _bad_weight(model) == "the weight blocks.1.down.Qt"


def zero3_around(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return wrapped("zero3", model, optimizer, micro_batch=2)[0]


def held(rank: int, world_size: int, engine: str) -> dict[str, Any]:
    """Of every part the elements that this rank holds, the whole, and both once more after a write and a restore."""
    model = packed_net()
    if engine == "fsdp2":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    attach(model, optimizer, SETTINGS, 30).detach()
    around = zero3_around(model, optimizer) if engine == "zero3" else model
    loss = around(global_batch(0)[0].chunk(world_size)[rank]).square().sum()
    backward_and_step(engine, around, optimizer, loss)
    trained = trained_parameters(model)
    shards = select_engine(list(trained.values()), around if engine == "zero3" else optimizer)
    found: dict[str, Any] = {"engine": type(shards).__name__}
    found["packed"] = [name for name, p in trained.items() if pack_of(p) is not None]
    assert not any(is_whole(p) for p in trained.values()) and shards.neighbours() == []
    for key in ("first", "restored"):
        whole = [whole_tensor(p).clone() for p in trained.values()]
        for k, (p, span, value) in enumerate(zip(trained.values(), shards.spans(), shards.values(), strict=True)):
            local, own = local_elements(p)
            assert own == span and torch.equal(local, value.reshape(-1)) and torch.equal(local, local_part(p).view(-1))
            assert torch.equal(whole[k].flatten()[span.start : span.stop], local) and len(held_parts(p)) >= 1
            assert torch.equal(shards.full(k), whole[k])
        found[key] = whole, [{n: v.clone() for n, v in state.items()} for state in shards.states()]
        doubled = [2 * v for v in shards.values()]
        shards.restore(doubled, [{n: v if n == "step" else 3 * v for n, v in s.items()} for s in shards.states()])
    return found


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_what_ranks_hold_is_said_of_the_parts(engine: str) -> None:
    ranks = run_ranks(3, held, engine)
    for found in ranks:
        assert found["engine"] == "PackedEngine" and len(found["packed"]) == 8
        (values, states), (doubled, tripled) = found["first"], found["restored"]
        for before, after in zip(values, doubled, strict=True):
            assert torch.equal(2 * before, after)
        for before, after in zip(states, tripled, strict=True):
            assert before.keys() == {"step", "exp_avg", "exp_avg_sq"} and float(before["step"]) == 1
            assert all(torch.equal(after[n], before[n] if n == "step" else 3 * before[n]) for n in before)
    assert all(torch.equal(a, b) for a, b in zip(ranks[0]["first"][0], ranks[2]["first"][0], strict=True))


def recomputed(rank: int, world_size: int, engine: str, packs: bool, how: str) -> list[float]:
    """Losses of a LLaMA whose activations are made again or not."""
    model: Any = tiny_llama(40)
    settings = config(targets=("all-linear",), dropout=0.1)
    adapt(model, settings)
    nn.init.ones_(model.adalora.lam)
    assert pack_adapters(model, settings) if packs else True
    if engine == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    attach(model, optimizer, settings, 30).detach()
    if how != "no":
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()
    model.train()
    around = zero3_around(model, optimizer) if engine == "zero3" else model
    losses = []
    for step in range(3):
        torch.manual_seed(step)
        ids = torch.arange(12).view(2, 6) + step
        loss = around(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(loss.item())
        backward_and_step(engine, around, optimizer, loss)
    return losses


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_block_that_runs_again_in_backward(engine: str) -> None:
    [expected] = run_ranks(1, recomputed, "single", False, "no")
    # DeepSpeed takes a gradient once a step, and lambda, of the whole model, has one in each reentrant checkpoint.
    for how in ("not reentrant", *["reentrant"] * (engine == "fsdp2")):
        for found in run_ranks(2, recomputed, engine, True, how):
            assert found == pytest.approx(expected, rel=1e-5), how


def test_states_of_different_counts_of_steps_are_refused() -> None:
    model = packed_net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(global_batch(0)[0]).square().sum().backward()
    optimizer.step()
    trained = trained_parameters(model)
    shards, states = select_engine(list(trained.values()), optimizer), None
    states = [dict(state) for state in shards.states()]
    shards.restore(shards.values(), states)
    first = next(k for k, p in enumerate(trained.values()) if pack_of(p) is not None)
    states[first]["step"] = torch.tensor(7.0)
    with pytest.raises(UserError, match=r"different numbers of steps \(1.0, 7.0\).* pack_adapters to false"):
        shards.restore(shards.values(), states)


def test_names_of_states_have_one_order_in_every_process() -> None:
    """Hashes of texts differ between processes that are not forked, and with them the order of sets."""
    code = (
        "import torch\n"
        "from adalora_dist.methods.protocol import trained_parameters\n"
        "from adalora_dist.sharding import select_engine\n"
        "from tests.sharding.test_packing import global_batch, packed_net\n"
        "model = packed_net()\n"
        "optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])\n"
        "model(global_batch(0)[0]).square().sum().backward()\n"
        "optimizer.step()\n"
        "states = select_engine(list(trained_parameters(model).values()), optimizer).states()\n"
        "print({tuple(state) for state in states})\n"
    )
    for seed in ("1", "2", "3"):
        done = run_command(sys.executable, "-c", code, PYTHONHASHSEED=seed)
        assert done.stdout == "{('step', 'exp_avg', 'exp_avg_sq')}\n", done.stderr


def test_a_block_that_loses_everything_has_no_parameter_left() -> None:
    model = packed_net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    block, none, two = model.blocks[0], torch.arange(0), torch.tensor([0, 2])
    before = {name: whole_tensor(p).clone() for name, p in trained_parameters(model).items()}
    shrinks = [Shrink(layer, leaf, none) for layer in (block.up, block.down) for leaf in ("P", "Qt")]
    shrinks.append(Shrink(model.blocks[1].up, "Qt", two))
    shrink_parameters(model, optimizer, shrinks)
    assert not packs_of(block) and "packed_adapters0" not in dict(block.named_parameters())
    left = trained_parameters(model)
    assert set(before) - set(left) == {f"blocks.0.{layer}.{leaf}" for layer in ("up", "down") for leaf in ("P", "Qt")}
    for name, part in left.items():
        expected = before[name][..., two] if name == "blocks.1.up.Qt" else before[name]
        assert torch.equal(whole_tensor(part), expected), name


def test_blocks_of_a_list_of_lists_are_its_layers() -> None:
    """Funnel's stages: what is called is a layer, which FSDP2 gathers and adapters are packed in."""
    model: Any = tiny_model(FunnelForSequenceClassification)
    settings = config(targets=("all-linear",))
    adapt(model, settings)
    assert name_blocks(model) == {"FunnelLayer"}
    assert pack_adapters(model, settings) > 0
    assert all(type(module).__name__ == "FunnelLayer" for module in model.modules() if packs_of(module))
