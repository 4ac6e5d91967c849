"""What may happen to a model with packs before there is an engine, and between runs of its forward."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM

from adalora_dist import UserError, adapt, pack_adapters, parameter_groups
from adalora_dist.methods import method_for
from adalora_dist.methods.protocol import adapters_of, trained_parameters
from adalora_dist.sharding.packing import pack_of, packs_of, part_of
from adalora_dist.sharding.tensors import is_whole, whole_tensor
from adalora_dist.tasks.evaluation.batches import evaluating
from tests.support.models import adapted_net, config, global_batch
from tests.support.ranks import run_ranks
from tests.support.tiny_language_model import tiny_llama

SETTINGS = config()
LORA_PLUS = config("lora", lora_plus_ratio=4.0, init_rank=3)


def packed_net(settings: Any = SETTINGS) -> Any:
    model = adapted_net(settings)
    nn.init.normal_(model.adalora.lam, generator=torch.Generator().manual_seed(3))
    assert pack_adapters(model, settings) == 8
    return model


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole_tensor(part).clone() for name, part in trained_parameters(model).items()}


def assert_same(model: Any, other: Any) -> None:
    values, others = values_of(model), values_of(other)
    assert list(values) == list(others) and all(torch.equal(values[name], others[name]) for name in values)
    x = global_batch(0)[0]
    assert torch.equal(model(x), other(x))


def test_a_pickled_model_keeps_its_packs_and_so_do_copies_of_it() -> None:
    model = packed_net()
    model(global_batch(0)[0]).sum().backward()
    again = pickle.loads(pickle.dumps(model))
    for other in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert_same(model, other)
        for block in other.blocks:
            [pack] = packs_of(block).values()
            assert pack.block is block and pack.flat is block.packed_adapters0
            assert all(pack_of(part) is pack for part in pack.parts)
    part = pickle.loads(pickle.dumps(trained_parameters(model)))["blocks.0.up.P"]  # parts before their packs
    assert torch.equal(whole_tensor(part), values_of(model)["blocks.0.up.P"])


@pytest.mark.parametrize("settings", [SETTINGS, LORA_PLUS], ids=["adalora", "lora+"])
def test_an_interrupt_in_the_middle_of_a_forward_leaves_names_and_groups(settings: Any) -> None:
    """Ctrl-C in a notebook, which no forward hook hears; then a save, or another optimizer."""
    model, fresh = packed_net(settings), packed_net(settings)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.blocks[0].down.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(global_batch(0)[0])
    handle.remove()
    values, expected = values_of(model), values_of(fresh)
    assert list(values) == list(expected) and all(torch.equal(values[name], expected[name]) for name in values)
    sizes = [
        [sum(p.numel() for p in group["params"]) for group in parameter_groups(net, settings, 1e-3)]
        for net in (model, fresh)
    ]
    assert sizes[0] == sizes[1]
    assert_same(model, fresh)


def recomputed_selectively(rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
    """Gradients of blocks that run again without being called, their layers in another order than they lie in."""
    found = []
    for how in ("plain", "packed"):
        model = adapted_net(SETTINGS)
        nn.init.ones_(model.adalora.lam)
        assert how == "plain" or pack_adapters(model, SETTINGS)
        for block in model.blocks:
            block._modules["up"] = block._modules.pop("up")
        model.adalora.layers = tuple(reversed(model.adalora.layers))
        model.adalora.index()
        kept = partial(create_selective_checkpoint_contexts, [torch.ops.aten.tanh.default])
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=kept)
        for _ in range(2):
            model(global_batch(0)[0]).square().sum().backward()
        held = {name: (p, pack_of(p)) for name, p in trained_parameters(model).items()}
        found.append({n: p.grad if k is None else part_of(k.flat.grad, p) for n, (p, k) in held.items()})  # type: ignore[arg-type]
        assert all(pack._views is None for block in model.blocks for pack in packs_of(block).values())
    return found


def test_blocks_that_run_again_are_cut_once() -> None:
    """Selective checkpoints want the operations of the first run, and no others (BART, whose queries come before its
    keys and lie behind them)."""
    [(plain, packed)] = run_ranks(1, recomputed_selectively)
    for name, gradient in plain.items():
        torch.testing.assert_close(packed[name], gradient)


def test_what_is_packed_or_frozen_already_is_left_alone() -> None:
    model = packed_net()
    before = values_of(model)
    assert pack_adapters(model, SETTINGS) == 0 and values_of(model).keys() == before.keys()
    frozen = adapted_net(SETTINGS)
    frozen.requires_grad_(False)
    assert pack_adapters(frozen, SETTINGS) == 0 and not any(p.requires_grad for p in frozen.parameters())
    partly = adapted_net(LORA_PLUS)
    partly.blocks[0].up.P.requires_grad_(False)
    assert pack_adapters(partly, LORA_PLUS) == 7
    partly(global_batch(0)[0]).sum().backward()
    assert "blocks.0.up.P" not in trained_parameters(partly) and partly.blocks[0].up.P.grad is None


def test_what_would_be_written_to_a_part_and_lost_is_one_line() -> None:
    part = packed_net().blocks[0].up.P
    for write in (
        nn.init.zeros_,
        lambda p: p.detach_() and None,
        lambda p: p.__setitem__(0, 1.0),
        lambda p: p.__imul__(2),
    ):
        with torch.no_grad(), pytest.raises(UserError, match="of a packed P or Q, .* set them before pack_adapters"):
            write(part)
    assert part.shape == (13, 3) and part.requires_grad_() is part and part.detach().is_meta


def test_two_types_are_two_packs() -> None:
    model = adapted_net(SETTINGS)
    model.blocks[0].up.to(torch.bfloat16)
    before = {name: p.dtype for name, p in trained_parameters(model).items()}
    assert pack_adapters(model, SETTINGS) == 8
    assert sorted(packs_of(model.blocks[0])) == ["packed_adapters0", "packed_adapters1"]
    assert {name: whole_tensor(p).dtype for name, p in trained_parameters(model).items()} == before


def sharded_first(rank: int, world_size: int) -> str:
    model = adapted_net(SETTINGS)
    fully_shard(model)
    with pytest.raises(UserError) as error:
        pack_adapters(model, SETTINGS)
    return str(error.value)


def test_a_model_that_is_sharded_already_is_refused() -> None:
    [said] = run_ranks(1, sharded_first)
    assert said.startswith("pack_adapters: blocks.0.up.P is sharded already: call it after adapt, before")


def test_layers_shrink_before_there_is_an_engine() -> None:
    """As a run that goes on from a checkpoint with fewer triplets, of a model that was packed first."""
    plain, model = adapted_net(SETTINGS), adapted_net(SETTINGS)
    for net in (plain, model):
        nn.init.normal_(net.adalora.lam, generator=torch.Generator().manual_seed(3))
    pack_adapters(model, SETTINGS)
    kept = [[], [0, 2], [1], [0, 1, 2]]
    for net in (plain, model):
        layers = adapters_of(net)
        method_for(SETTINGS).shrink(layers, {a.name: k for a, k in zip(layers, kept, strict=True)})
    values, expected = values_of(model), values_of(plain)
    assert values.keys() == expected.keys() and all(torch.equal(values[name], expected[name]) for name in values)
    x = global_batch(0)[0]
    torch.testing.assert_close(model(x), plain(x))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())


def test_a_state_dict_is_saved_as_the_model_is(tmp_path: Path) -> None:
    """``model.save_pretrained(folder, state_dict=accelerator.get_state_dict(model))``, as loops with accelerate do."""
    tiny_llama(40).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = config(targets=("all-linear",))
    adapt(model, settings)
    nn.init.ones_(model.adalora.lam)
    pack_adapters(model, settings)
    model.save_pretrained(tmp_path / "own")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for p in model.parameters():
        nn.init.zeros_(p)
    model.save_pretrained(tmp_path / "given", state_dict=state)
    del state["model.layers.1.packed_adapters0"]
    with pytest.raises(UserError, match=r"state_dict lacks model.layers.1.self_attn.q_proj.P"):
        model.save_pretrained(tmp_path / "lacking", state_dict=state)
    own, given = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "given"))
    assert own.keys() == given.keys() and all(torch.equal(own[name], given[name]) for name in own)


def left_gathered(rank: int, world_size: int) -> list[bool]:
    model = adapted_net(SETTINGS)
    fully_shard(model, reshard_after_forward=False)
    found = []
    for _ in range(2):
        with evaluating(model):
            model(global_batch(0)[0])
        found.append(any(is_whole(p) for p in model.parameters()))
    return found


def test_an_evaluation_leaves_nothing_gathered() -> None:
    """A head that stays gathered would be multiplied with the block before it, and is given up before that goes back.

    With FSDP2 as accelerate sets it up: it leaves the head gathered until a backward.
    """
    assert run_ranks(1, left_gathered) == [[False, False]]
