"""The training loop against a plain PyTorch loop, and the settings that must not change what is learnt."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import set_seed
from transformers import OPTConfig, OPTForCausalLM

from adalora_dist.config.methods import AdaLoraConfig
from adalora_dist.config.sections import TrainConfig
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt
from adalora_dist.tasks.batches import BatchPlan, collate
from adalora_dist.tasks.commonsense.config import CommonsenseConfig, CommonsenseDataConfig
from adalora_dist.tasks.commonsense.prompts import encode_examples, prompt_text
from adalora_dist.tasks.commonsense.rows import load_tasks
from adalora_dist.tasks.losses import causal_loss
from adalora_dist.tasks.rows.tokens import EncodedRow
from adalora_dist.training.engine import build_accelerator
from adalora_dist.training.loop import train
from adalora_dist.training.prepared import check_budget, learning_rate, prepare, total_steps
from adalora_dist.training.run_checkpoints import writes_in_thread
from adalora_dist.training.run_folder import RunFolder
from tests.support.ranks import run_ranks
from tests.support.refusals import refused
from tests.support.settings import adapter_section
from tests.support.tiny_language_model import tiny_llama, word_tokenizer
from tests.support.tiny_project import write_data

STEPS = 12


def settings(**changes: Any) -> CommonsenseConfig:
    """12 steps of 8 rows, 14 matrices of rank 3, pruned to 14 triplets; any field of either section can be changed."""
    adapter = {"init_rank": 3, "target_rank": 1, "targets": ("all-linear",), "start": "paper", "init": "orthonormal"}
    training = {"max_steps": STEPS, "batch_size": 8, "micro_batch_size": 8, "learning_rate": 1e-2, "log_every": 5}
    for name, value in changes.items():
        (adapter if name in AdaLoraConfig.model_fields else training)[name] = value
    return CommonsenseConfig(adapter=adapter_section(**adapter), train=TrainConfig(**training))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[EncodedRow]:
    """30 rows of unequal lengths with four targets and EOS each; prompts count as well, so target counts differ."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "data")
    examples, _ = load_tasks(CommonsenseDataConfig(source=str(folder / "data")))
    tokenizer = word_tokenizer([text for e in examples for text in (prompt_text(e), e.output)])
    return encode_examples(examples, tokenizer, 256, "all")


def plan_of(rows: list[EncodedRow], config: CommonsenseConfig) -> BatchPlan:
    return BatchPlan.of_rows(rows, config.train.batch_size, config.train.seed, config.train.group_by_length)


def backbone() -> Any:
    return tiny_llama(100)


def run_loop(
    rank: int, world_size: int, rows: list[EncodedRow], config: CommonsenseConfig, other: Any = None
) -> dict[str, Any]:
    """A whole run of the loop; the losses it returned, the lines it logged, and the adapters it made."""
    accelerator = build_accelerator(config.train)
    set_seed(config.train.seed)
    model = other or backbone()
    adapt(model, config.adapter, config.train.seed)
    plan = plan_of(rows, config)
    prepared = prepare(accelerator, model, config, total_steps(config.train, plan))
    folder = RunFolder(config, True, {})
    losses = train(accelerator, prepared, plan, causal_loss(rows, 0, accelerator.device), config, folder, print)
    adapters = prepared.hooks.updates()
    return {
        "losses": losses,
        "metrics": [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()],
        "ranks": list(prepared.hooks.method_step.rank_pattern().values()),
        "allocations": [
            (a.step, a.budget, a.keep.tolist()) for a in getattr(prepared.hooks.method_step, "allocations", ())
        ],
        "lam": torch.cat([a.lam for a in adapters]),
        "factors": torch.cat([a.P.flatten() for a in adapters]),
        "held": [m.rank for m in prepared.hooks.method_step.layers],
        "skipped": prepared.hooks.num_skipped_steps,
    }


def run_plainly(rank: int, world_size: int, rows: list[EncodedRow], config: CommonsenseConfig) -> dict[str, Any]:
    """The same run as anybody would write it: transformers' own loss over the whole batch, no accelerate."""
    set_seed(config.train.seed)
    model = backbone()
    adapt(model, config.adapter, config.train.seed)
    plan = plan_of(rows, config)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1.0, weight_decay=config.train.weight_decay)
    hooks = attach(model, optimizer, config.adapter, STEPS)
    allocator = hooks.method_step
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = learning_rate(config.train, step, STEPS)
        loss = model(**collate([rows[i] for i in plan.batch(step)], 0)).loss
        loss.backward()
        if config.train.max_grad_norm:
            norms.append(torch.nn.utils.clip_grad_norm_(trainable, config.train.max_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    hooks.finish()
    return {
        "losses": losses,
        "norms": norms,
        "ranks": list(allocator.rank_pattern().values()),
        "allocations": [(a.step, a.budget, a.keep.tolist()) for a in allocator.allocations],
        "lam": torch.cat([a.lam for a in hooks.updates()]),
    }


@pytest.fixture
def loop(rows: list[EncodedRow], tmp_path: Path) -> Any:
    """Runs the loop in a process of its own; repeated settings of one test run anew."""
    count = iter(range(100))

    def run(num_rows: int | None = None, **changes: Any) -> dict[str, Any]:
        config = settings(output_dir=str(tmp_path / str(next(count))), **changes)
        return run_ranks(1, run_loop, rows[:num_rows], config)[0]

    return run


def assert_same(result: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(expected["losses"]), rtol=0, atol=tolerance)
    assert result["allocations"] == expected["allocations"]
    torch.testing.assert_close(result["lam"], expected["lam"], rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("cosine", [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8))]),
        ("constant", [0.5, *[1.0] * 9]),
    ],
)
def test_learning_rate(kind: Any, expected: list[float]) -> None:
    train = TrainConfig(learning_rate=3e-3, lr_schedule=kind, lr_warmup_ratio=0.2)
    assert [learning_rate(train, step, 10) / 3e-3 for step in range(10)] == pytest.approx(expected)


def test_learning_rate_without_warm_up_and_with_nothing_else() -> None:
    train = TrainConfig(learning_rate=1.0, lr_warmup_ratio=0)
    assert [learning_rate(train, step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert learning_rate(train, 0, 1) == 1.0
    train = TrainConfig(learning_rate=1.0, lr_warmup_ratio=0.99)
    assert [learning_rate(train, step, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("word", "on_cpu", "on_gpu"), [("auto", False, True), ("on", True, True), ("off", False, False)]
)
def test_where_checkpoints_are_written_while_training_goes_on(word: Any, on_cpu: bool, on_gpu: bool) -> None:
    train = TrainConfig(async_checkpoints=word)
    assert [writes_in_thread(train, torch.device(kind)) for kind in ("cpu", "cuda")] == [on_cpu, on_gpu]


# ---------------------------------------------------------------------------------------------------- the whole run


def test_loop_is_a_plain_training_loop(rows: list[EncodedRow], loop: Any) -> None:
    expected = run_ranks(1, run_plainly, rows, settings())[0]
    result = loop()
    assert_same(result, expected)
    assert expected["losses"][-1] < expected["losses"][0] - 0.5 and sum(expected["ranks"]) == 14
    assert len({tuple(keep) for _, _, keep in expected["allocations"]}) > 3
    assert [record["step"] for record in result["metrics"]] == list(range(STEPS))
    assert [record["loss"] for record in result["metrics"]] == result["losses"]
    budgets = dict(zip(range(STEPS), (record["budget"] for record in result["metrics"]), strict=True))
    assert budgets[0] == 42 and budgets[STEPS - 1] == 14
    for step, budget, _ in result["allocations"]:
        assert budgets[step] == budget and result["metrics"][step]["allocated"]
        assert 0 < result["metrics"][step]["importance_spread"] < 10
    assert [r["gradient_norm"] for r in result["metrics"]] == pytest.approx(expected["norms"], rel=1e-3)
    seconds = [record["seconds"] for record in result["metrics"]]
    assert seconds == sorted(seconds) and seconds[-1] > 0 and result["metrics"][-1]["peak_memory_gib"] > 0.01
    last, ranks = result["metrics"][-1], result["ranks"]  # a log line measures more
    assert (last["min_rank"], last["max_rank"]) == (min(ranks), max(ranks)) and last["orthogonality"] >= 0
    assert last["mean_rank"] == sum(ranks) / len(ranks) and last["epoch"] == pytest.approx(
        STEPS / plan_of(rows, settings()).num_steps(1.0)
    )


def test_layers_that_steps_leave_out_on_one_process_of_a_group(rows: list[EncodedRow], tmp_path: Path) -> None:
    """As torchrun starts it: DDP is there, and waits for the gradients of all."""
    sizes = dict(hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=6, num_attention_heads=2)
    model = OPTForCausalLM(OPTConfig(vocab_size=100, max_position_embeddings=256, layerdrop=0.5, **sizes))
    config = settings(output_dir=str(tmp_path / "run"), targets=("fc1", "fc2"))
    [result] = run_ranks(1, run_loop, rows, config, model)
    assert len(result["losses"]) == STEPS and sum(result["ranks"]) == 12


@pytest.mark.parametrize("micro_batch_size", [2, 1])
def test_accumulation_changes_nothing(loop: Any, micro_batch_size: int) -> None:
    assert_same(loop(micro_batch_size=micro_batch_size), loop())


def test_micro_batches_by_tokens_change_nothing(rows: list[EncodedRow], loop: Any) -> None:
    longest = max(len(row["input_ids"]) for row in rows)
    assert_same(loop(micro_batch_tokens=2 * longest, micro_batch_size=3), loop())
    plan, train = plan_of(rows, settings()), settings(micro_batch_tokens=longest - 1).train
    with refused(f"micro_batch_tokens {longest - 1}: the longest row has {longest} tokens"):
        check_budget(plan, train)
    check_budget(plan, settings(micro_batch_tokens=longest).train)


def test_fewer_rows_than_the_batch_size(rows: list[EncodedRow], loop: Any) -> None:
    """One batch of five rows per epoch, in fewer micro-batches than the batch size asks for."""
    expected = run_ranks(1, run_plainly, rows[:5], settings())[0]
    assert_same(loop(num_rows=5, micro_batch_size=2), expected)


def test_gradient_checkpointing_changes_nothing(loop: Any) -> None:
    assert_same(loop(gradient_checkpointing=True), loop())


def test_clipping_is_applied(rows: list[EncodedRow], loop: Any) -> None:
    tight, off = loop(max_grad_norm=1e-4, weight_decay=0.3), loop(max_grad_norm=0, weight_decay=0.3)
    assert tight["losses"][-1] != pytest.approx(off["losses"][-1], abs=1e-3)
    for norm, result in ((1e-4, tight), (0.0, off)):
        assert_same(result, run_ranks(1, run_plainly, rows, settings(max_grad_norm=norm, weight_decay=0.3))[0])


def test_bf16_meets_the_budget(loop: Any) -> None:
    result, expected = loop(precision="bf16"), loop()
    assert sum(result["ranks"]) == 14 and int((result["lam"] != 0).sum()) == 14
    assert [a[:2] for a in result["allocations"]] == [a[:2] for a in expected["allocations"]]
    difference = (torch.tensor(result["losses"]) - torch.tensor(expected["losses"])).abs()
    assert 0 < difference.max() < 0.5  # it did compute in bf16, and learnt the same


def test_compaction_is_a_switch_that_changes_only_what_is_held(loop: Any) -> None:
    compacted, masked = loop(weight_decay=0.3), loop(weight_decay=0.3, compact=False)
    assert compacted["held"] == compacted["ranks"] == masked["ranks"] != masked["held"] == [3] * 14
    torch.testing.assert_close(compacted["losses"], masked["losses"], rtol=1e-6, atol=0)


def test_lora_keeps_its_ranks(loop: Any) -> None:
    result = loop(method="lora")
    assert result["ranks"] == [3] * 14 and result["allocations"] == []
    assert torch.equal(result["lam"], torch.ones(42)) and result["factors"].abs().max() > 0
    assert result["losses"][-1] < result["losses"][0] - 0.5
    assert "budget" not in result["metrics"][0]


def test_seed_decides(loop: Any) -> None:
    first, again, other = loop(seed=1), loop(seed=1), loop(seed=2)
    assert first["losses"] == again["losses"] and torch.equal(first["lam"], again["lam"])
    assert first["losses"] != other["losses"] and not torch.equal(first["lam"], other["lam"])


def test_steps_follow_from_epochs_unless_given(rows: list[EncodedRow]) -> None:
    for epochs, expected in ((1, 3), (2.5, 8), (0.01, 1)):
        config = settings(max_steps=None, epochs=epochs)
        assert total_steps(config.train, plan_of(rows, config)) == expected
    assert total_steps(settings(epochs=9).train, plan_of(rows, settings())) == STEPS
