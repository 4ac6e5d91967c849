"""Several rows in one sequence, without seeing each other: what would be padding holds other rows.

Rows of one micro-batch share sequences, none longer than its longest row, so that neither attention nor anything else
costs more than with padding. Which rows share one is a function of their lengths alone; which rows are in a micro-batch
is the plan's affair (``batches.py``) and does not change. So packed and unpacked runs take the same rows in the same
steps, have the same losses and gradients but for rounding, and continue from each other's checkpoints.

In a packed sequence positions begin at 0 with every row. By that transformers' attention knows rows apart: masks are
block-diagonal (sdpa, eager), and kernels of variable length (FlashAttention) get the rows' ends; the latter take one
sequence for all rows. A model that does not keep rows apart is refused by its name, after a trial with itself.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from adalora_dist.config.sections import PackedTrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.tasks.evaluation.batches import evaluating
from adalora_dist.tasks.padding import is_purely_causal, unwrapped
from adalora_dist.tasks.rows.tokens import IGNORED, EncodedRow

WORTH = 0.1
"""Share of all positions that must be saved for ``auto`` to pack."""
_NUM_STEPS = 200  # of a plan, that are looked at for this share
_ROWS = ((3, 4, 5, 6, 7), (8, 9, 10))
_OTHER_FIRST = (11, 5, 12, 4, 13)


def sequences(lengths: Sequence[int], flat: bool = False) -> list[list[int]]:
    """Which rows share a sequence, by their numbers: each sequence is at most as long as the longest row.

    Longest first, each into the first sequence that has room for it.

    Args:
        lengths: tokens of each row.
        flat: all rows in one sequence, of whatever length.
    """
    if flat:
        return [list(range(len(lengths)))]
    capacity, made, room = max(lengths), list[list[int]](), list[int]()
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = next((k for k, left in enumerate(room) if left >= lengths[row]), len(made))
        if place == len(made):
            made.append([])
            room.append(capacity)
        made[place].append(row)
        room[place] -= lengths[row]
    return made


def pack(rows: Sequence[EncodedRow], padding_token: int, flat: bool = False) -> dict[str, torch.Tensor]:
    """``input_ids``, ``labels`` and ``position_ids`` [sequences, longest]; see :func:`sequences`.

    No row's first token is a target: what stands before it is of another row. What is left of a sequence is padding, in
    the positions of one more row.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("no rows to pack: use collate")
    packs = sequences([len(row["input_ids"]) for row in rows], flat)
    longest = max(sum(len(rows[index]["input_ids"]) for index in pack) for pack in packs)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for pack in packs:
        tokens: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for index in pack:
            tokens += rows[index]["input_ids"]
            labels += [IGNORED, *rows[index]["labels"][1:]]
            positions += range(len(rows[index]["input_ids"]))
        left = longest - len(tokens)
        columns["input_ids"].append(tokens + [padding_token] * left)
        columns["labels"].append(labels + [IGNORED] * left)
        columns["position_ids"].append([*positions, *range(left)])
    return {name: torch.tensor(column) for name, column in columns.items()}


def is_flat(model: nn.Module) -> bool:
    """Whether the model's attention takes all rows as one sequence, with the ends of each: FlashAttention of any kind.

    In more than one it would not look at positions, and rows would see each other.
    """
    return "flash" in (getattr(unwrapped(model).config, "_attn_implementation", None) or "")


def packed_positions(lengths: Sequence[int], flat: bool = False) -> int:
    """Positions that rows of these lengths have when they are packed: sequences x the longest."""
    ends = [sum(lengths[row] for row in pack) for pack in sequences(lengths, flat)]
    return len(ends) * max(ends)


def with_packing(plan: BatchPlan, flat: bool) -> BatchPlan:
    """The same rows in the same steps; micro-batches by tokens count packed positions."""
    packed = copy.copy(plan)
    packed.packed = partial(packed_positions, flat=flat)
    return packed


def positions_of(
    plan: BatchPlan, micro_batch_size: int, world_size: int, flat: bool, micro_batch_tokens: int = 0
) -> tuple[int, int, int]:
    """(tokens, positions with padding, positions packed) of the first steps of a run."""

    steps = range(min(plan.num_batches_per_epoch, _NUM_STEPS))
    sizes = world_size, micro_batch_size, micro_batch_tokens

    def positions(plan: BatchPlan) -> int:
        return sum(plan.positions(rows) for step in steps for rows in plan.parts(step, *sizes) if rows)

    tokens = sum(plan.lengths[row] for step in steps for row in plan.batch(step))
    return tokens, positions(plan), positions(with_packing(plan, flat))


def decide(
    model: nn.Module,
    plan: BatchPlan,
    train: PackedTrainConfig,
    world_size: int,
    padding_token: int,
    say: Callable[[str], None],
) -> bool:
    """Whether to pack the rows of ``plan``, as ``packing`` asks; says what that saves. Collective, see :func:`refusal`.

    Raises:
        UserError: packing is on, and the model cannot; it names the model.
    """
    if train.packing == "off":
        return False
    sizes = train.micro_batch_size, world_size, is_flat(model), train.micro_batch_tokens
    tokens, padded, packed = positions_of(plan, *sizes)
    saved = f"padding is {1 - tokens / padded:.1%} of all positions without it, {1 - tokens / packed:.1%} with it"
    if train.packing == "auto" and padded - packed < WORTH * padded:
        say(f"Packing: off, as it saves too little: {saved}")
        return False
    if reason := refusal(model, padding_token, train.precision == "fp32"):
        if train.packing == "on":
            raise UserError(f"packing=on: {reason}; set packing to off")
        say(f"Packing: off, as {reason}")
        return False
    say(f"Packing: on; {saved}, and {1 - packed / padded:.1%} of the positions are saved")
    return True


def refusal(model: nn.Module, padding_token: int, is_precise: bool = True) -> str:
    """Why this model's rows cannot be packed; "": they can. Tries it: forwards, collective where weights are sharded.

    Two short rows in one sequence must have the logits that each has alone, and those of the second must not change
    with the tokens of the first: both but for rounding, as an expert's tokens are computed together.

    Args:
        is_precise: the model computes in fp32.
    """
    inner = unwrapped(model)
    name = type(inner).__name__
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return f"{name} takes no position_ids, by which rows in one sequence are known"
    if not is_purely_causal(model):
        return f"{name} is not causal throughout, so padding needs a mask, which packed rows cannot have"
    vocab_size = inner.config.get_text_config().vocab_size
    first, second, other = ([token % vocab_size for token in row] for row in (*_ROWS, _OTHER_FIRST))
    with evaluating(model) as device:

        def logits(*rows: list[int]) -> torch.Tensor:
            encoded: list[EncodedRow] = [{"input_ids": row, "labels": row} for row in rows]
            batch = pack(encoded, padding_token, flat=True)
            del batch["labels"]
            output = model(**{name: x.to(device) for name, x in batch.items()}, use_cache=False)
            found: torch.Tensor = output.logits.float()[0]
            return found

        packed, alone = logits(first, second), torch.cat([logits(first), logits(second)])
        moved = logits(other, second)
    cut = len(first)
    largest = float(alone.abs().max())
    if float((packed[cut:] - moved[cut:]).abs().max()) > (1e-5 if is_precise else 1e-2) * largest:
        return f"{name} with attention {getattr(inner.config, '_attn_implementation', '?')} lets rows see each other"
    if float((packed - alone).abs().max()) > (1e-4 if is_precise else 5e-2) * largest:
        return f"{name} does not begin the positions of each row anew"
    return ""
