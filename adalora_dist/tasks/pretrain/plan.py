"""Which windows train in which step: a :class:`BatchPlan` that needs no memory, however long the text is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import overload

from adalora_dist.io.digest import digest_of
from adalora_dist.tasks.batches import BatchPlan

_ROUNDS = 4


class Constant(Sequence[int]):
    """One number, ``count`` times."""

    def __init__(self, value: int, count: int) -> None:
        self._value, self._count = value, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            return Constant(self._value, len(range(*index.indices(self._count))))
        return self._value


class WindowPlan(BatchPlan):
    """Every epoch all windows once, in a random order that is a function of (seed, epoch, position).

    Nothing is shuffled in advance: position p of an epoch is window permuted(p). So a run that goes on anywhere, on any
    number of processes, finds the windows that it would have had.

    Args:
        num_windows: of ``length`` tokens each; all but the first of a window are targets.
        content: digest of the text.
    """

    def __init__(self, num_windows: int, length: int, batch_size: int, seed: int, content: str) -> None:
        if num_windows < 1 or length < 2 or batch_size < 1:
            raise ValueError(f"{num_windows} windows of {length}, batch size {batch_size}")
        self.lengths = Constant(length, num_windows)  # type: ignore[assignment]
        self.target_counts = Constant(length - 1, num_windows)  # type: ignore[assignment]
        self.batch_size = min(batch_size, num_windows)
        self.seed, self.content, self.group_by_length = seed, content, False
        self.num_batches_per_epoch = num_windows // self.batch_size
        self._step = -1
        self._rows: list[int] = []

    @property
    def longest(self) -> int:
        return self.lengths[0]

    def fingerprint(self) -> str:
        described = [len(self.lengths), self.lengths[0], self.batch_size, self.seed, self.content]
        return digest_of([json.dumps(described).encode()])

    def batch(self, step: int) -> list[int]:
        if step != self._step:
            epoch, position = divmod(step, self.num_batches_per_epoch)
            first, count = position * self.batch_size, len(self.lengths)
            key = f"{self.seed} {epoch}".encode()
            self._rows = [permuted(k, count, key) for k in range(first, first + self.batch_size)]
            self._step = step
        return self._rows


def permuted(position: int, count: int, key: bytes) -> int:
    """Where ``position`` goes in a random permutation of ``count`` places that ``key`` chooses.

    A Feistel network over the smallest square of powers of two that holds ``count``, walked until it is inside.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for number in range(_ROUNDS):
            digest = hashlib.blake2b(right.to_bytes(8, "big") + bytes([number]), key=key[:64], digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        position = left << half | right
        if position < count:
            return position
