"""Turning questions into tokens, and dealing them out in batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.batches import BatchPlan, PairPlan, collate, count_targets
from adalora_dist.tasks.commonsense.prompts import encode_example, encode_examples, prompt_text, prompt_tokens
from adalora_dist.tasks.commonsense.rows import Example
from adalora_dist.tasks.packing import with_packing
from adalora_dist.tasks.rows.tokens import IGNORED, padding_token
from tests.support.paths import shared
from tests.support.ranks import run_ranks
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama


@pytest.fixture
def example():
    instruction = "Is water wet?\n\nAnswer format: true/false"
    return Example(instruction, "", "the correct answer is true", "true", ("true", "false"), "boolq", "made-up:1")


def refusal(action, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- tokens


def test_reply_and_eos_are_the_targets(example):
    tokenizer = byte_tokenizer()
    row = encode_example(example, tokenizer, 512)
    text = prompt_text(example)
    assert tokenizer.decode(row["input_ids"]) == f"<s>{text}{example.output}</s>"
    num_prompt = 1 + len(text)
    assert row["labels"] == [IGNORED] * num_prompt + row["input_ids"][num_prompt:]
    assert count_targets(row["labels"]) == len(example.output) + 1
    everything = encode_example(example, tokenizer, 512, train_on="all")
    assert everything["labels"] == [IGNORED] + row["input_ids"][1:]
    assert everything["input_ids"] == row["input_ids"]


def test_the_input_field_is_part_of_the_prompt(example):
    text = prompt_text(replace(example, input="Sea water."))
    assert text.index("Is water wet?") < text.index("Sea water.") < text.index("### Response:\n")


def test_a_long_prompt_loses_its_left_and_the_reply_nothing(example):
    tokenizer = byte_tokenizer()
    whole = tokenizer.decode(encode_example(example, tokenizer, 512)["input_ids"])
    # "...false" and EOS is the longest reply; room is kept for it whatever the right answer is
    num_longest = len("the correct answer is false") + 1
    for max_length in (num_longest + 1, num_longest + 2, 60):
        row = encode_example(example, tokenizer, max_length)
        text = tokenizer.decode(row["input_ids"])
        assert len(row["input_ids"]) == max_length - 1 <= max_length  # "true" is one byte shorter than "false"
        assert count_targets(row["labels"]) == len(example.output) + 1
        assert whole.endswith(text.removeprefix("<s>"))
        assert text.startswith("<s>") == (max_length > num_longest + 1)  # a single prompt token is the last one
    message = refusal(encode_example, example, tokenizer, num_longest)
    assert message.startswith(example.origin) and f"--max-length to {num_longest + 1}" in message


@pytest.mark.parametrize(
    "tokenizer",
    [byte_tokenizer(bos=False), byte_tokenizer(eos=False), byte_tokenizer(False, False, False)],
    ids=["no BOS", "no EOS", "neither, no PAD"],
)
def test_tokenizers_without_special_tokens(example, tokenizer):
    row = encode_example(example, tokenizer, 512)
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
    assert tokenizer.decode(row["input_ids"]) == bos + prompt_text(example) + example.output + eos
    assert count_targets(row["labels"]) == len(example.output) + bool(eos)


def test_a_tokenizer_that_closes_every_text_does_not_close_the_prompt(example):
    plain, closing = byte_tokenizer(), byte_tokenizer(adds_eos=True)
    assert closing("x")["input_ids"][-1] == 2
    assert encode_example(example, closing, 512) == encode_example(example, plain, 512)


def test_padding_falls_back_to_eos():
    assert padding_token(byte_tokenizer()) == 0
    assert padding_token(byte_tokenizer(pad=False)) == 2
    assert padding_token(byte_tokenizer(eos=False, pad=False)) == 0


def test_no_rows_are_refused():
    assert "0 rows" in refusal(encode_examples, [], byte_tokenizer(), 64)


def test_a_sentencepiece_style_tokenizer_keeps_the_boundary(example):
    tokenizer = AutoTokenizer.from_pretrained(shared("models/stories260k"))
    row = encode_example(example, tokenizer, 512)
    prompt = prompt_tokens(example, tokenizer, 512)
    assert prompt[0] == tokenizer.bos_token_id and row["input_ids"][: len(prompt)] == prompt
    targets = [token for token in row["labels"] if token != IGNORED]
    assert tokenizer.decode(targets, skip_special_tokens=True).strip() == example.output
    assert targets[-1] == tokenizer.eos_token_id


# ---- batches


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    batch_size=st.integers(1, 20),
    micro_batch_size=st.integers(1, 8),
    world_size=st.integers(1, 5),
    group_by_length=st.booleans(),
    step=st.integers(0, 200),
)
def test_ranks_and_micro_steps_partition_the_global_batch(
    lengths, batch_size, micro_batch_size, world_size, group_by_length, step
):
    plan = BatchPlan(lengths, lengths, batch_size, seed=6, group_by_length=group_by_length)
    batch = plan.batch(step)
    assert len(batch) == len(set(batch)) == min(batch_size, len(lengths))
    by_rank = [plan.micro_batches(step, rank, world_size, micro_batch_size) for rank in range(world_size)]
    num_micro_steps = -(-len(batch) // (micro_batch_size * world_size))
    assert {len(parts) for parts in by_rank} == {num_micro_steps}
    assert [row for part in zip(*by_rank, strict=True) for rows in part for row in rows] == batch
    assert max(len(rows) for parts in by_rank for rows in parts) <= micro_batch_size
    assert plan.num_target_tokens(step) == sum(lengths[row] for row in batch)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    limit=st.integers(40, 200),
    world_size=st.integers(1, 5),
    kind=st.sampled_from(["padded", "packed", "flat", "pairs"]),
    step=st.integers(0, 200),
)
def test_micro_batches_by_tokens_partition_the_global_batch(lengths, limit, world_size, kind, step):
    plan = BatchPlan(lengths, lengths, 20, seed=6)
    if kind == "pairs":
        plan = PairPlan([length // 2 for length in lengths], [-(-length // 2) for length in lengths], 20, seed=6)
    elif kind != "padded":
        plan = with_packing(plan, flat=kind == "flat")
    by_rank = [plan.micro_batches(step, rank, world_size, 1, limit) for rank in range(world_size)]
    parts = plan.parts(step, world_size, 1, limit)
    assert [part for micro in zip(*by_rank, strict=True) for part in micro] == parts
    assert sorted(row for part in parts for row in part) == sorted(plan.batch(step))
    assert max(plan.positions(part) for part in parts if part) <= limit
    assert sum(1 for part in parts if not part) < world_size, "a micro-step has nothing to do"
    if kind == "flat":  # none could be left out, even if rows were cut
        assert (len(by_rank[0]) - 1) * world_size * (limit - 39) < sum(lengths[row] for row in plan.batch(step))


def test_micro_batches_by_tokens_are_even_and_the_longest_come_first():
    plan = BatchPlan([8] * 4 + [2] * 12, [1] * 16, 16, seed=0)
    of_all = plan.parts(0, 1, 1, micro_batch_tokens=24)
    assert [plan.positions(part) for part in of_all] == [24, 24, 20] and [len(part) for part in of_all] == [3, 3, 10]
    dealt = plan.parts(0, 2, 1, micro_batch_tokens=24)
    assert len(dealt) == 4 and max(plan.positions(part) for part in dealt) == 16
    assert [plan.lengths[part[0]] for part in dealt] == [8, 8, 2, 2]


@pytest.mark.parametrize("group_by_length", [False, True])
def test_an_epoch_uses_each_row_at_most_once_and_drops_less_than_a_batch(group_by_length):
    plan = BatchPlan([1 + row % 7 for row in range(103)], [1] * 103, 10, seed=1, group_by_length=group_by_length)
    epochs = [[plan.batch(10 * epoch + step) for step in range(10)] for epoch in range(3)]
    for epoch in epochs:
        rows = [row for batch in epoch for row in batch]
        assert len(rows) == len(set(rows)) == 100
    left_out = [set(range(103)) - {row for batch in epoch for row in batch} for epoch in epochs]
    assert epochs[0] != epochs[1] and len(set(map(frozenset, left_out))) > 1


def test_a_plan_can_start_anywhere_and_depends_on_the_seed():
    lengths = [3 * row % 17 + 1 for row in range(50)]
    steps = [BatchPlan(lengths, lengths, 8, seed=3).batch(step) for step in range(20)]  # a new plan every time
    plan = BatchPlan(lengths, lengths, 8, seed=3)
    assert [plan.batch(step) for step in reversed(range(20))] == steps[::-1]
    assert [BatchPlan(lengths, lengths, 8, seed=4).batch(step) for step in range(20)] != steps
    assert [plan.num_steps(epochs) for epochs in (1, 2.5, 0.01)] == [6, 15, 1]


def test_grouping_by_length_saves_padding():
    lengths = [1 + (37 * row) % 101 for row in range(400)]

    def padded(group_by_length: bool) -> int:
        plan = BatchPlan(lengths, lengths, 8, seed=0, group_by_length=group_by_length)
        return sum(8 * max(lengths[row] for row in plan.batch(step)) for step in range(50))

    assert padded(True) < 1.1 * sum(lengths) < padded(False)


def test_a_plan_without_rows_is_refused():
    with pytest.raises(ValueError, match="0 lengths"):
        BatchPlan([], [], 8, seed=0)


def test_a_plan_knows_its_rows_by_content():
    """Equal lengths and target counts do not make equal rows."""
    inputs = [{"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 1]}, {"input_ids": [8, 9], "token_type_ids": [0, 1]}]
    answers = [[1.0], [0.5]]

    def changed(index: int, name: str, values: list[int]) -> list[dict[str, list[int]]]:
        return [row | {name: values} if k == index else row for k, row in enumerate(inputs)]

    cases = [
        (inputs, answers),
        (changed(1, "input_ids", [8, 10]), answers),
        (changed(0, "token_type_ids", [0, 1, 1]), answers),
        (inputs[::-1], answers[::-1]),
        (inputs, [[1.0], [0.25]]),
    ]
    prints = {BatchPlan.of_inputs(rows, wanted, 2, seed=0).fingerprint() for rows, wanted in cases}
    assert len(prints) == 5
    again = [dict(row) for row in inputs]
    assert BatchPlan.of_inputs(again, [(1,), (0.5,)], 2, seed=0).fingerprint() in prints
    plan = BatchPlan.of_inputs(inputs, answers, 2, seed=0)
    assert plan.lengths == [3, 2] and plan.num_target_tokens(0) == 2


def test_the_first_label_is_no_target():
    assert count_targets([7, 8, IGNORED, 9]) == 2
    assert count_targets([7]) == count_targets([IGNORED, IGNORED]) == 0


def test_collate_pads_on_the_right():
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [IGNORED]}]
    batch = collate(rows, padding_token=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED] * 3]


def _gradient_differences(rank: int, _: int, rows: list) -> list[tuple[int, float, int]]:
    """(world size, largest relative difference from one big batch, number of empty micro-batches)."""
    model, plan = tiny_llama(259), BatchPlan.of_rows(rows, 7, seed=0)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])

    expected = gradient(model(**collate(rows, 0)).loss)  # transformers' own mean over the targets
    outcomes = []
    for world_size, micro_batch_size in ((1, 3), (2, 2), (3, 2), (8, 1)):
        total, num_empty = torch.zeros_like(expected), 0
        for simulated_rank in range(world_size):
            for indices in plan.micro_batches(0, simulated_rank, world_size, micro_batch_size):
                num_empty += not indices
                batch = collate([rows[index] for index in indices], 0)
                logits, targets = model(**batch).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
                loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
                total += gradient(loss / plan.num_target_tokens(0))
        outcomes.append((world_size, ((total - expected).norm() / expected.norm()).item(), num_empty))
    return outcomes


def test_the_gradient_does_not_depend_on_ranks_or_accumulation(example):
    """Loss sums of all ranks and micro-steps over num_target_tokens: the mean over the global batch's targets."""
    rows = [encode_example(example, byte_tokenizer(), length, "all") for length in (40, 90, 50, 70, 60, 80, 45)]
    [outcomes] = run_ranks(1, _gradient_differences, rows)  # a backward pass in this process would make forks unsafe
    assert [(world_size, num_empty) for world_size, _, num_empty in outcomes] == [(1, 0), (2, 0), (3, 0), (8, 1)]
    assert max(difference for _, difference, _ in outcomes) < 1e-5
