"""``BranchLinear``: a frozen linear map with a branch of two thin matrices, whatever a method makes them of.

And ``Drawn``: random matrices that are not trained. They are no parameters and no buffers: nothing shards, casts or
saves them; whoever knows the seed draws them again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from adalora_dist.backbones.linears import is_conv1d, linear_shape
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adapter import device_of
from adalora_dist.methods.dropout import Dropout
from adalora_dist.methods.protocol import Adapter, Step


class BranchLinear(Adapter):
    """``y = base(x) + W h(x)`` over any base that maps (..., d_in) to (..., d_out); h(x), W from :meth:`branch`.

    The base is called, never opened: ``nn.Linear``, transformers' ``Conv1D`` and quantised linears are alike. The
    branch computes in the type of the base's output.
    """

    def __init__(self, base: nn.Module, name: str, rank: int, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.name = name  # of the base in the plain model: engines and compilers change module paths
        self.d_in, self.d_out = linear_shape(base) or (0, 0)
        self.rank, self.scale = rank, scale
        self.dropout = Dropout(dropout) if dropout else None

    def vector(self, *shape: int, value: float = 0.0) -> nn.Parameter:
        """A trained float32 parameter on the base's device."""
        return nn.Parameter(torch.full(shape, value, dtype=torch.float32, device=device_of(self.base)))

    def branch(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            tokens: (tokens, d_in), in the type of the base's output.

        Returns:
            h (tokens, r) and W (d_out, r), the scale included: what :meth:`onto` takes.
        """
        raise NotImplementedError(f"{type(self).__name__}.branch")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Two dimensions from here on, so that the add below is in place on the base's own output.
        tokens = x.reshape(-1, self.d_in)
        y: torch.Tensor = self.base(tokens)
        hidden, weight = self.branch((tokens if self.dropout is None else self.dropout(tokens)).to(y.dtype))
        return self.onto(y, hidden, weight, in_place=True).view(*x.shape[:-1], self.d_out)

    def onto(self, y: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, in_place: bool = False) -> torch.Tensor:
        """y (tokens, d_out) + W h; ``in_place``: y need not be left as it was."""
        return add_product(y, hidden, weight, in_place)

    def description(self) -> dict[str, Any]:
        sizes = {"d_out": self.d_out, "d_in": self.d_in, "init_rank": self.rank}
        return sizes | {"scale": self.scale, "is_transposed": is_conv1d(self.base)}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"


def add_product(y: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, in_place: bool = False) -> torch.Tensor:
    """y (tokens, d_out) + hidden (tokens, r) times weight (d_out, r) transposed, in the type of y."""
    # Under autocast a product has its type, whatever y has.
    add = y.addmm_ if in_place else y.addmm
    return add(hidden.to(y.dtype), weight.to(y.dtype).T)


class BranchStep(Step):
    """Ranks stay as they are."""

    def __init__(self, layers: Sequence[BranchLinear]) -> None:
        super().__init__(layers)
        self.layers = list(layers)

    def rank_pattern(self) -> dict[str, int]:
        return {layer.name: layer.rank for layer in self.layers}


def drawn_seed(generator: torch.Generator) -> int:
    """A seed from 0 to 2^62 - 1."""
    return int(torch.randint(2**62, (), generator=generator))


def drawn_number(seed: int, step: int, first: int, last: int) -> int:
    """A number from ``first`` to ``last``, uniform over steps, the same on every machine."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return first + int.from_bytes(digest[:8], "big") % (last - first + 1)


class Drawn:
    """Frozen random matrices that ``draw`` gives, float32 on the CPU, alike on every process; in use as copies.

    Engines see no parameter and no buffer in it: nothing is sharded, gathered, cast for good or saved. A copy on a
    device and in a type is made when it is first asked for.
    """

    def __init__(self, draw: Callable[[], tuple[torch.Tensor, ...]], what: str, digest: str | None = None) -> None:
        """
        Args:
            draw: gives the same whenever it is called; a ``functools.partial``, so that models can be pickled.
            what: for messages.
            digest: :meth:`digest` of those that were trained with.
        """
        self._draw, self._what, self._expected = draw, what, digest
        self._found: str | None = None
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, ...]] = {}

    @property
    def matrices(self) -> tuple[torch.Tensor, ...]:
        """As drawn.

        Raises:
            UserError: this torch draws others from the same seed than those that were trained with.
        """
        return self.on(torch.device("cpu"), torch.float32)

    def like(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """On the tensor's device, in its type; raises as :attr:`matrices`."""
        return self.on(tensor.device, tensor.dtype)

    def on(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """On a device, in a type; raises as :attr:`matrices`."""
        if not self._copies:
            self._copies[torch.device("cpu"), torch.float32] = drawn = self._first()
            if self._expected is not None and self._digest_of(drawn) != self._expected:
                self._copies.clear()
                raise UserError(
                    f"{self._what}: torch {torch.__version__} draws other numbers from this seed than those that were "
                    "trained with: use the version of torch that the run had (run.json)"
                )
        if (device, dtype) not in self._copies:
            self._copies[device, dtype] = tuple(m.to(device, dtype) for m in self.matrices)
        return self._copies[device, dtype]

    def digest(self) -> str:
        """SHA-256 of the numbers."""
        return self._digest_of(self.matrices)

    def _first(self) -> tuple[torch.Tensor, ...]:
        with torch.device("cpu"):  # also where a model is being built on meta
            return self._draw()

    def _digest_of(self, matrices: tuple[torch.Tensor, ...]) -> str:
        if self._found is None:
            sha256 = hashlib.sha256()
            for matrix in matrices:
                sha256.update(matrix.contiguous().numpy().tobytes())
            self._found = sha256.hexdigest()
        return self._found
