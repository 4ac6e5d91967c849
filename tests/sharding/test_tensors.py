"""What is asked of a tensor has the same answer on every engine, but for the part that a process holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from adalora_dist.sharding.tensors import (
    first_row,
    full_numel,
    full_shape,
    gather_for,
    held_parts,
    is_whole,
    local_part,
    put_back_shards,
    release_gathered,
    whole_tensor,
)
from tests.support.ranks import import_deepspeed, run_ranks

deepspeed = import_deepspeed()
ROWS, COLUMNS = 5, 3  # two processes: rows 0-2 and 3-4, or elements 0-7 and 8-14


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight

    def total(self) -> torch.Tensor:
        return self.weight.sum()


def answers(rank: int, world_size: int, engine: str) -> dict[str, Any]:
    model: Any = Model()
    if engine == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)), reshard_after_forward=False)
    elif engine == "zero3":
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = torch.optim.AdamW(model.parameters())
        model = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]

    def weight() -> torch.Tensor:
        return next(model.parameters())

    found = {
        "is_whole": is_whole(weight()),
        "shape": tuple(full_shape(weight())),
        "numel": full_numel(weight()),
        "local": local_part(weight()).tolist(),
        "first_row": None if engine == "zero3" else first_row(weight()),
        "held": sum(part.numel() for part in held_parts(weight())),
    }
    with torch.no_grad():
        model(torch.ones(2, ROWS))  # an evaluation, after which engines may leave the weight gathered
    release_gathered(model)
    found |= {"still_whole": is_whole(weight()), "whole": whole_tensor(weight()).tolist()}
    if engine != "zero3":
        gather_for(model, "total")
        with torch.no_grad():
            found["total"] = model.total().item()
        put_back_shards(model)
        assert is_whole(weight()) == found["is_whole"]
    return found


@pytest.mark.parametrize("engine", ["plain", "fsdp2", "zero3"])
def test_every_engine_answers(engine: str) -> None:
    if engine == "zero3" and deepspeed is None:
        pytest.skip("deepspeed is not installed")
    whole = Model().weight.tolist()
    elements = [x for row in whole for x in row]
    held: list[Any] = {
        "plain": [whole, whole], "fsdp2": [whole[:3], whole[3:]], "zero3": [elements[:8], elements[8:]]
    }[engine]  # fmt: skip
    for rank, found in enumerate(run_ranks(2, answers, engine)):
        assert found["is_whole"] is found["still_whole"] is (engine == "plain")
        assert found["shape"] == (ROWS, COLUMNS) and found["numel"] == ROWS * COLUMNS
        # The padding of ZeRO-3's last part is of no meaning.
        assert found["local"][: len(held[rank])] == held[rank] and found["whole"] == whole
        assert found["held"] == {"plain": 15, "fsdp2": [9, 6][rank], "zero3": 8}[engine]
        assert found["first_row"] == {"plain": 0, "fsdp2": [0, 3][rank], "zero3": None}[engine]
        assert found.get("total", sum(elements)) == sum(elements)
