"""Experts: what adaptive rank costs beside LoRA on them, and whether the budget goes where it serves. Any machine.

    python benchmarks/experts.py cost     operations and saved bytes of every step, counted: ours, LoRA, PEFT
    python benchmarks/experts.py task     a task that two experts of eight can serve: adaptive against uniform, 3 seeds
    python benchmarks/experts.py rare     all experts can serve, and those two get a tenth of the others' tokens

No times, so that a loaded machine says the same. The task: tokens of eight kinds, the kind chooses the expert; a
teacher that differs from the student's base in two experts alone, by an update of rank 6 in each projection.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as tf
from operations import Counts
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from adalora_dist import AdaLoraConfig, LoraConfig, adapt, attach

NUM_EXPERTS, D, HIDDEN = 8, 32, 32
SERVING, RANK_OF_TEACHER = (2, 5), 6
INIT_RANK, UNIFORM_RANK = 8, 2
STEPS, TOKENS, RATE, ALPHA = 400, 512, 5e-3, 8.0
"""alpha over the rank at the start is the scale: 1 for adaptive ranks, 4 for uniform ones."""


class Mixture(nn.Module):
    """Tokens (n, D) of known kinds through the experts of a layer of Mixtral's, one for each."""

    def __init__(self) -> None:
        super().__init__()
        config = tf.MixtralConfig(hidden_size=D, intermediate_size=HIDDEN, num_local_experts=NUM_EXPERTS)
        config._experts_implementation = "eager"
        self.experts = MixtralExperts(config)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=D**-0.5)

    def forward(self, x: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.experts(x, kinds.unsqueeze(1), torch.ones(len(x), 1))
        return y


def teacher_of(student: Mixture, rare: bool) -> Mixture:
    teacher = Mixture()
    teacher.load_state_dict(student.state_dict())
    with torch.no_grad():
        for weight in (teacher.experts.gate_up_proj, teacher.experts.down_proj):
            for expert in range(NUM_EXPERTS) if rare else SERVING:
                a, b = torch.randn(RANK_OF_TEACHER, weight.shape[2]), torch.randn(weight.shape[1], RANK_OF_TEACHER)
                weight[expert] += b @ a / (D * RANK_OF_TEACHER) ** 0.5
    return teacher


def batch(generator: torch.Generator, rare: bool, num: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    shares = torch.ones(NUM_EXPERTS)
    if rare:
        shares[list(SERVING)] = 0.1
    return torch.randn(num, D, generator=generator), torch.multinomial(shares, num, True, generator=generator)


def learn(seed: int, rare: bool, config: Any) -> tuple[float, float]:
    """(error on tokens of the experts that serve, over that without adapters; share of the final budget there)."""
    torch.manual_seed(seed)
    student = Mixture()
    teacher = teacher_of(student, rare)
    adapt(student, config, seed)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    hooks = attach(student, optimizer, config, STEPS)
    generator = torch.Generator().manual_seed(seed)
    noise = 0.3  # without which an expert whose weights are right has no gradient at all
    for _ in range(STEPS):
        x, kinds = batch(generator, rare)
        with torch.no_grad():
            y = teacher(x, kinds) + noise * torch.randn(x.shape, generator=generator)
        (student(x, kinds) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        hooks.replace(student, optimizer)
    hooks.finish()
    torch.manual_seed(seed)
    base = Mixture()
    x = torch.randn(4096, D, generator=generator)
    kinds = torch.tensor(SERVING).repeat(2048)
    with torch.no_grad():
        wanted = teacher(x, kinds)
        error = (student(x, kinds) - wanted).square().mean() / (base(x, kinds) - wanted).square().mean()
    pattern = hooks.rank_pattern()
    there = sum(rank for name, rank in pattern.items() if int(name.split(".")[1]) in SERVING)
    assert sum(pattern.values()) == 2 * NUM_EXPERTS * UNIFORM_RANK
    return error.item(), there / sum(pattern.values())


def variants() -> dict[str, Any]:
    common: dict[str, Any] = dict(targets=("experts",), alpha=ALPHA)
    falling = common | dict(init_rank=INIT_RANK, target_rank=UNIFORM_RANK, initial_warmup_steps=40, final_steps=160)
    return {
        "adaptive": AdaLoraConfig(**falling, mask_interval_steps=10),
        "adaptive, by token": AdaLoraConfig(**falling, mask_interval_steps=10, expert_scores="per_token"),
        "adaptive, equal shares": AdaLoraConfig(**falling, mask_interval_steps=10, budget_scope="local"),
        "uniform (LoRA)": LoraConfig(**common, init_rank=UNIFORM_RANK),
    }


def task(rare: bool) -> dict[str, list[tuple[float, float]]]:
    """Of every variant what :func:`learn` gives, for three seeds."""
    return {name: [learn(seed, rare, config) for seed in range(3)] for name, config in variants().items()}


# ------------------------------------------------------------------------------------------------------------- cost


NUM_STEPS = 8


class Step(NamedTuple):
    """What was counted in one of them."""

    operations: int
    saved: int
    """Bytes that its forward keeps for backward, beside parameters."""


class Run(NamedTuple):
    model: Any
    optimizer: torch.optim.Optimizer
    hooks: Any = None


def small_mixtral(num_layers: int) -> Any:
    """Layers of eight experts, in sizes that torch's grouped kernel takes."""
    torch.manual_seed(0)
    config = tf.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=NUM_EXPERTS, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    model = tf.MixtralForCausalLM(config)
    model.config.use_cache = False
    return model


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)


def ours(config: Any) -> Callable[[Any], Run]:
    def make(model: Any) -> Run:
        adapt(model, config)
        optimizer = adamw(model)
        return Run(model, optimizer, attach(model, optimizer, config, NUM_STEPS))

    return make


def of_peft(model: Any) -> Run:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(model, PeftConfig(r=4, target_modules=[], target_parameters=names))
    return Run(adapted, adamw(adapted))


def steps_of(make: Callable[[Any], Run], num_layers: int) -> list[Step]:
    """Of every step of a run but the first, which finds out what there is."""
    model, optimizer, hooks = make(small_mixtral(num_layers))
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(NUM_STEPS):
        own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, dict[int, int]()

        def keep(tensor: torch.Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with Counts() as counts:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(Step(sum(counts.aten.values()), sum(kept.values())))
        if hooks is not None:
            hooks.replace(model, optimizer)
    return found[1:]


def cost(num_layers: int = 4) -> dict[str, list[Step]]:
    """Of every variant what :func:`steps_of` gives. Ranks are equal at first, and ragged in the last two steps, after
    compaction."""
    common: dict[str, Any] = dict(targets=("experts",), init_rank=4)
    falling = AdaLoraConfig(**common, target_rank=2, initial_warmup_steps=1, final_steps=3, mask_interval_steps=2)
    return {
        "adaptive ranks": steps_of(ours(falling), num_layers),
        "LoRA": steps_of(ours(LoraConfig(**common)), num_layers),
        "PEFT, target_parameters": steps_of(of_peft, num_layers),
    }


def main() -> None:
    what = sys.argv[1] if len(sys.argv) > 1 else "cost"
    if what == "cost":
        for name, steps in cost().items():
            operations = " ".join(f"{step.operations:6,}" for step in steps)
            saved = ", ".join(f"{n / 1e3:,.1f}" for n in sorted({step.saved for step in steps}))
            print(f"{name:26} {operations} operations, {saved} kB saved for backward")
        return
    for name, results in task(rare=what == "rare").items():
        errors = ", ".join(f"{error:.3f}" for error, _ in results)
        shares = ", ".join(f"{100 * share:.0f} %" for _, share in results)
        print(f"{name:26} error {errors}; of the budget at the two experts {shares}")


if __name__ == "__main__":
    main()
