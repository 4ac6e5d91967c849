"""What each method costs beside LoRA of equal size: time of a step, and bytes kept for the backward pass.

    python benchmarks/methods.py                      four maps of 768 x 768, 128 tokens; a minute on one core
    python benchmarks/methods.py --tokens 1024

All methods are in one process, on copies of one model, at the parameters of LoRA of rank 8, and take turns: a figure
is the median over rounds of a method's thread CPU time over LoRA's of the same round. A step is forward, backward, the
optimizer's and the method's own part. PEFT's layers, at the same ranks, take their turns among them. Bytes are those of
the tensors that autograd keeps between forward and backward, each storage once; left out are parameters, frozen random
matrices and the batch. They do not depend on the machine. Dated results lie beside this file.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig as PeftLora
from peft import VeraConfig as PeftVera
from peft import get_peft_model
from speed import ratio, take_turns
from torch import nn

from adalora_dist.config.methods import MethodConfig, method_config
from adalora_dist.io.markdown import table
from adalora_dist.methods.branch import Drawn
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt, parameter_groups
from adalora_dist.methods.parameter_budget import within_budget

WIDTH, NUM_MAPS, RANK, TOTAL_STEPS = 768, 4, 8, 100_000
BUDGET = str(NUM_MAPS * RANK * 2 * WIDTH)
MAPS = r"maps\.\d+"


class Maps(nn.Module):
    """(tokens, width) -> (tokens, width), with GELU between the maps."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(NUM_MAPS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, linear in enumerate(self.maps):
            x = linear(x) if number == 0 else linear(nn.functional.gelu(x))
        return x


def ours() -> dict[str, MethodConfig]:
    """At LoRA's size; VeRA and DVoRA, which cannot reach it, at the published rank; BitFit as it is."""
    sized: dict[str, Any] = {"budget": BUDGET, "targets": (MAPS,)}
    names = ("lora", "adalora", "lora_fa", "dora", "adadora", "hydra", "dylora")
    configs = {name: method_config(name, **sized) for name in names}
    configs |= {name: method_config(name, init_rank=256, targets=(MAPS,)) for name in ("vera", "dvora")}
    for name in ("houlsby", "series", "parallel"):
        configs[name] = method_config(name, budget=BUDGET, positions=(MAPS,))
    return configs | {"bitfit": method_config("bitfit"), "full": method_config("full")}


def theirs() -> dict[str, Any]:
    common: dict[str, Any] = {"r": RANK, "lora_alpha": RANK, "target_modules": MAPS}
    vera = PeftVera(r=256, target_modules=MAPS)
    dora = PeftLora(**{**common, "r": within_dora()}, use_dora=True)
    return {"PEFT lora": PeftLora(**common), "PEFT dora": dora, "PEFT vera": vera}


def within_dora() -> int:
    """DoRA's rank within the budget, so that PEFT's has the same."""
    config: Any = within_budget(Maps(), ours()["dora"])
    return int(config.init_rank)


def new_model() -> Maps:
    torch.manual_seed(0)
    return Maps()


def built(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model with a method's adapters, moved away from their start, and its optimizer with the method attached."""
    model: Any = new_model()
    if name in (configs := ours()):
        config = within_budget(model, configs[name])
        adapt(model, config)
        optimizer = torch.optim.AdamW(parameter_groups(model, config, 1e-4), lr=1e-4, fused=True)
        attach(model, optimizer, config, TOTAL_STEPS)
    else:
        model = get_peft_model(model, theirs()[name])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    return model, optimizer


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Of one forward, as a training step makes it."""
    model(x).square().mean().backward()  # what is made once, such as norms, is there then
    for parameter in model.parameters():
        parameter.grad = None
    drawn = [part for module in model.modules() for part in vars(module).values() if isinstance(part, Drawn)]
    frozen = [matrix for each in drawn for matrix in each.like(x)]
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *frozen, x)}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no other tensor gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    del y
    return sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(args.tokens, WIDTH, generator=torch.Generator().manual_seed(1))
    models = {name: built(name) for name in (*ours(), *theirs())}
    kept = {name: saved_bytes(model, x) for name, (model, _) in models.items()}
    seconds = take_turns({name: step_of(*parts, x) for name, parts in models.items()}, args.rounds)
    sizes = f"{NUM_MAPS} maps of {WIDTH} x {WIDTH}, {args.tokens} tokens, {args.rounds} rounds"
    print(f"{sizes}; torch {torch.__version__}, {platform.machine()}, one thread.\n")
    rows = []
    for name, (model, _) in models.items():
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row = {"method": name, "parameters": f"{count:,}", "step / LoRA's": f"{ratio(seconds, name, 'lora'):.2f}"}
        row |= {"kept, KiB": f"{kept[name] / 1024:,.0f}", "kept / LoRA's": f"{kept[name] / kept['lora']:.2f}"}
        rows.append(row)
    print(table(rows))
    for mine, other in (("dora", "PEFT dora"), ("lora", "PEFT lora"), ("vera", "PEFT vera")):
        print(f"\n{mine} takes {ratio(seconds, mine, other):.2f} of the step of {other}.")


if __name__ == "__main__":
    main()
