"""Which rows train in which step, as pure functions of the step: the same on 1 and N processes, resumable anywhere.

The loss of a step is the mean over the target tokens of its whole global batch. Every process knows all lengths, so
it knows that number of tokens without communication: each scales the *sum* of its token losses by it, and neither
the number of processes nor of accumulation steps changes the gradient. (An engine that averages gradients over N
processes needs a factor N.)
"""

from __future__ import annotations

import json
import random
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from adalora_dist.io.digest import digest_of
from adalora_dist.tasks.rows.tokens import IGNORED, EncodedRow

# Rows are sorted by length inside random pools of this many batches: long enough for little padding, short enough
# that batches differ from epoch to epoch.
POOL_BATCHES = 50

Positions = Callable[[Sequence[int]], int]
"""Lengths of rows -> positions of the tensors that hold them in one forward."""


class BatchPlan:
    """Rows of every step of a run.

    Each epoch is a new random order of all rows, cut into global batches. Rows that do not fill a last batch sit out
    this epoch (others do the next time); fewer rows than ``batch_size`` make one smaller batch per epoch. With
    ``group_by_length``, batches hold rows of similar length and come in random order.

    Args:
        lengths: tokens of each row.
        target_counts: target tokens of each row (``count_targets``); for a classifier, 1 each.
        batch_size: rows per step over all processes.
        seed: of the order; the order depends on nothing but it, the lengths and the epoch.
        content: digest of the rows themselves, by which a continued run knows that they are the same; without one it
            knows their lengths alone.

    Raises:
        ValueError: no rows, or as many target counts as lengths were not given.
    """

    packed: Positions | None = None
    """Positions where rows share sequences (``packing.py``); None: every row is padded to the longest."""

    def __init__(
        self,
        lengths: Sequence[int],
        target_counts: Sequence[int],
        batch_size: int,
        seed: int,
        group_by_length: bool = True,
        content: str = "",
    ) -> None:
        if not lengths or len(lengths) != len(target_counts) or batch_size < 1:
            raise ValueError(f"{len(lengths)} lengths, {len(target_counts)} target counts, batch size {batch_size}")
        self.lengths = list(lengths)
        self.target_counts = list(target_counts)
        self.batch_size = min(batch_size, len(lengths))
        self.seed = seed
        self.group_by_length = group_by_length
        self.num_batches_per_epoch = len(lengths) // self.batch_size
        self.content = content
        self._epoch = -1
        self._batches: list[list[int]] = []

    @classmethod
    def of_rows(cls, rows: Sequence[EncodedRow], batch_size: int, seed: int, group_by_length: bool = True) -> BatchPlan:
        """The plan for token sequences with labels."""
        lengths = [len(row["input_ids"]) for row in rows]
        content = digest_of(_numbers([*row["input_ids"], *row["labels"]]) for row in rows)
        return cls(lengths, [count_targets(row["labels"]) for row in rows], batch_size, seed, group_by_length, content)

    @classmethod
    def of_inputs(
        cls,
        inputs: Sequence[Mapping[str, Sequence[int]]],
        answers: Sequence[Sequence[float]],
        batch_size: int,
        seed: int,
        group_by_length: bool = True,
    ) -> BatchPlan:
        """The plan for what an encoder takes of each row, ``input_ids`` and others, with one target each."""
        lengths = [len(row["input_ids"]) for row in inputs]
        rows = zip(inputs, answers, strict=True)
        content = digest_of(_numbers([*chain.from_iterable(row.values()), *answer]) for row, answer in rows)
        return cls(lengths, [1] * len(lengths), batch_size, seed, group_by_length, content)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    def fingerprint(self) -> str:
        """Equal for plans that put the same rows into the same steps."""
        described = [
            self.lengths, self.target_counts, self.batch_size, self.seed, self.group_by_length, self.content
        ]  # fmt: skip
        return digest_of([json.dumps(described).encode()])

    def num_steps(self, epochs: float) -> int:
        """Optimizer steps in ``epochs`` passes, rounded, at least 1."""
        return max(1, round(epochs * self.num_batches_per_epoch))

    def batch(self, step: int) -> list[int]:
        """Row indices of global step ``step`` (0 first), all processes together."""
        epoch, position = divmod(step, self.num_batches_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[position]

    def num_target_tokens(self, step: int) -> int:
        """Target tokens of the whole global batch: what the loss of ``step`` is divided by."""
        return sum(self.target_counts[row] for row in self.batch(step))

    def positions(self, rows: Sequence[int]) -> int:
        """Positions, padding among them, that these rows have in one forward; what ``micro_batch_tokens`` bounds."""
        lengths = [self.lengths[row] for row in rows]
        return self.packed(lengths) if self.packed is not None else len(lengths) * max(lengths)

    def micro_batches(
        self, step: int, rank: int, world_size: int, micro_batch_size: int, micro_batch_tokens: int = 0
    ) -> list[list[int]]:
        """Row indices of one process in each micro-step of ``step``: its part of :meth:`parts`."""
        return self.parts(step, world_size, micro_batch_size, micro_batch_tokens)[rank::world_size]

    def parts(self, step: int, world_size: int, micro_batch_size: int, micro_batch_tokens: int = 0) -> list[list[int]]:
        """Row indices of every forward of ``step``: of the first micro-step those of all processes, then of the next.

        All processes get the same number of micro-steps, the fewest possible, and at most ``micro_batch_size`` rows
        in each; or, where that is not 0, at most ``micro_batch_tokens`` :meth:`positions`, whatever the number of rows
        (one row at least). Where rows do not divide evenly, a list can be empty (``collate`` then makes a row without
        targets, because a forward may be collective).
        """
        rows = self.batch(step)
        if micro_batch_tokens:
            rows = sorted(rows, key=lambda row: -self.lengths[row])
            return _within(rows, self.positions, micro_batch_tokens, world_size)
        num_micro_steps = -(-len(rows) // (micro_batch_size * world_size))
        of_steps = (_part(rows, micro_step, num_micro_steps) for micro_step in range(num_micro_steps))
        return [_part(part, rank, world_size) for part in of_steps for rank in range(world_size)]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        generator = random.Random(f"{self.seed} {epoch}")  # seeded by the text: the same on every machine
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        del order[self.num_batches_per_epoch * self.batch_size :]
        if self.group_by_length:
            pool = POOL_BATCHES * self.batch_size
            order = [
                row
                for start in range(0, len(order), pool)
                for row in sorted(order[start : start + pool], key=lambda row: self.lengths[row])
            ]
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        if self.group_by_length:
            generator.shuffle(batches)
        return batches


class PairPlan(BatchPlan):
    """The plan for an encoder-decoder: rows' sources and their targets are tensors of their own.

    Args:
        num_source, num_targets: tokens of each row's two sides.
    """

    def __init__(
        self,
        num_source: Sequence[int],
        num_targets: Sequence[int],
        batch_size: int,
        seed: int,
        group_by_length: bool = True,
        content: str = "",
    ) -> None:
        lengths = [sum(pair) for pair in zip(num_source, num_targets, strict=True)]
        super().__init__(lengths, num_targets, batch_size, seed, group_by_length, content)

    def positions(self, rows: Sequence[int]) -> int:
        targets = [self.target_counts[row] for row in rows]
        sources = [self.lengths[row] - count for row, count in zip(rows, targets, strict=True)]
        return len(targets) * (max(sources) + max(targets))


def count_targets(labels: Sequence[int]) -> int:
    """Target tokens of one row. The first label does not count: a causal model predicts from the second on."""
    return sum(label != IGNORED for label in labels[1:])


def collate(rows: Sequence[EncodedRow], padding_token: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors [rows, longest]: ``input_ids``, ``attention_mask`` (1: real token), ``labels``.

    Without rows, one row of two real tokens (one would leave nothing after the causal shift) and no target: its loss
    sum and gradients are zero.
    """
    rows = rows or [{"input_ids": [padding_token] * 2, "labels": [IGNORED] * 2}]
    shape = (len(rows), max(len(row["input_ids"]) for row in rows))
    input_ids = torch.full(shape, padding_token, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[index, :length] = torch.tensor(row["input_ids"])
        attention_mask[index, :length] = 1
        labels[index, :length] = torch.tensor(row["labels"])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def collate_pairs(rows: Sequence[Mapping[str, Any]], padding_token: int) -> dict[str, torch.Tensor]:
    """Right-padded ``input_ids`` and ``attention_mask`` [rows, longest source] and ``labels`` [rows, longest target].

    For encoder-decoders: the two sides of a row have lengths of their own. Without rows, one row without a target.
    """
    rows = rows or [{"input_ids": [padding_token], "labels": [IGNORED]}]
    sources = collate([{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows], padding_token)
    labels = collate([{"input_ids": row["labels"], "labels": row["labels"]} for row in rows], padding_token)["labels"]
    return {"input_ids": sources["input_ids"], "attention_mask": sources["attention_mask"], "labels": labels}


def pad_columns(
    rows: Sequence[Mapping[str, Sequence[int]]], padding_token: int, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The named columns right-padded to [rows, longest], and ``attention_mask`` (1: real token).

    ``input_ids`` is padded with ``padding_token``, any other column with 0.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    padded = {}
    for name in names:
        filler = padding_token if name == "input_ids" else 0
        padded[name] = torch.tensor([[*row[name], *[filler] * (longest - len(row[name]))] for row in rows])
    lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
    padded["attention_mask"] = (torch.arange(longest) < lengths).long()
    return padded


def _numbers(row: Sequence[float]) -> bytes:
    return array("d", row).tobytes()


def _part(items: list[int], index: int, num_parts: int) -> list[int]:
    """Contiguous part ``index`` of ``num_parts``; sizes differ by at most one."""
    return items[index * len(items) // num_parts : (index + 1) * len(items) // num_parts]


def _within(
    rows: Sequence[int], positions: Callable[[Sequence[int]], int], limit: int, world_size: int
) -> list[list[int]]:
    """``rows``, the longest first, in parts of at most ``limit`` positions: as few per process as possible, and even.

    The longest come first, so that what a run needs at most it needs at once.
    """

    def cut(limit: int) -> list[list[int]]:
        made, start = [], 0
        while start < len(rows):
            ends = range(start + 1, len(rows) + 1)
            end = start + max(1, bisect_right(ends, limit, key=lambda end: positions(rows[start:end])))
            made.append(list(rows[start:end]))
            start = end
        return made

    num_parts = -(-len(cut(limit)) // world_size) * world_size
    lowest = max(positions([row]) for row in rows)
    lowest += bisect_left(range(lowest, limit), True, key=lambda tried: len(cut(tried)) <= num_parts)
    made = cut(lowest)
    return made + [[] for _ in range(-len(made) % world_size)]
