"""Do all ranks hold the same pattern? Six numbers in a reduction that is made anyway, and nobody waits for them.

Every rank adds its digest d (three numbers below 2^20) and d^2 to the sum. All digests are equal exactly if
world * sum(d^2) = (sum d)^2, and in float64 these integers stay exact over 8192 ranks.
"""

from __future__ import annotations

import torch

_BITS = 20


class PatternDigest:
    """Three numbers that change with any change of a pattern of ``num_triplets``; the same function on every rank."""

    def __init__(self, num_triplets: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = torch.randint(1, 2**_BITS, (num_triplets, 3), generator=generator)
        self._weights = weights.T.to(device, torch.float64).contiguous()

    def summands(self, keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """d and d^2, (3,) float64 each, of a (num_triplets,) bool pattern; zeros where nothing has been selected."""
        if keep is None:
            zeros = torch.zeros(3, dtype=torch.float64, device=self._weights.device)
            return zeros, zeros
        digest = torch.mv(self._weights, keep.double()) % 2**_BITS
        return digest, digest * digest


class DelayedSums:
    """The summands after their reduction: copied to the host in the background, looked at later."""

    def __init__(self, sums: torch.Tensor) -> None:
        self._copied = None
        self._sums = sums
        if sums.device.type != "cpu":
            self._sums = sums.to("cpu", non_blocking=True)
            self._copied = torch.get_device_module(sums.device).Event()
            self._copied.record()

    def agree(self, world_size: int) -> bool:
        """Whether all ranks had the same pattern. Waits for the copy only if it is asked at once."""
        if self._copied is not None:
            self._copied.synchronize()
        sums = [int(number) for number in self._sums.tolist()]
        return all(world_size * squares == total**2 for total, squares in zip(sums[:3], sums[3:], strict=True))
