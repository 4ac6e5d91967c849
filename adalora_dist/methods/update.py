"""What one matrix has become when training is over.

:class:`Update` is what merging, exports and adapter files ask, whichever method it is of; :class:`AdapterWeights`, sums
of triplets, is the one that most methods leave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch

from adalora_dist.io.errors import UserError


class Matrix(NamedTuple):
    """What adapter.json says of one matrix, whichever method it is of."""

    name: str
    shape: tuple[int, int]
    """d_out, d_in."""
    rank: int
    scale: float
    is_transposed: bool

    @classmethod
    def described(cls, name: str, sizes: Mapping[str, Any]) -> Matrix:
        """From what an adapter's ``description`` says."""
        shape = sizes["d_out"], sizes["d_in"]
        return cls(name, shape, sizes["init_rank"], sizes["scale"], sizes["is_transposed"])


class OfMatrix:
    """An update that is known by its ``matrix``; what an :class:`Update` is by default."""

    matrix: Matrix

    changes_bias: ClassVar[bool] = False
    not_merged: ClassVar[str] = ""

    @property
    def name(self) -> str:
        return self.matrix.name

    @property
    def rank(self) -> int:
        return self.matrix.rank

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        raise UserError(f"{self.name}: {self.not_merged}")

    def merged_bias(self, bias: torch.Tensor) -> torch.Tensor:
        return bias

    def as_lora(self) -> AdapterWeights | None:
        return None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields of a dataclass that are tensors."""
        values = {field.name: getattr(self, field.name) for field in fields(cast(Any, self))}
        return {kind: value for kind, value in values.items() if isinstance(value, torch.Tensor)}

    def settings(self) -> dict[str, Any]:
        return {}

    @classmethod
    def read(
        cls, matrices: Sequence[Matrix], tensors: Mapping[str, Mapping[str, torch.Tensor]], settings: Mapping[str, Any]
    ) -> list[Update]:
        """Of a dataclass that begins with its matrix, and has its tensors by the names that the folder has."""
        kind: Any = cls
        return [kind(matrix, **tensors[matrix.name]) for matrix in matrices]


def can_be_lora(kind: type[Update]) -> bool:
    """Whether updates of ``kind`` say themselves that they are sums of low rank."""
    default: Any = OfMatrix.as_lora
    return kind.as_lora is not default


class Update(Protocol):
    """What one matrix has become. All tensors are on the CPU, float32."""

    method: ClassVar[str]
    """Whose adapter folders hold it; "" for triplets, which several methods leave."""
    formula: ClassVar[str]
    """What adapter.json says of it."""
    changes_bias: ClassVar[bool]
    """Whether the bias of the matrix, where it has one, becomes another, too."""
    not_merged: ClassVar[str]
    """Why there is no :meth:`merged` of it; "": there is."""

    @property
    def matrix(self) -> Matrix:
        """Name and sizes."""
        ...

    @property
    def name(self) -> str:
        """Of the matrix in the plain model."""
        ...

    @property
    def rank(self) -> int:
        """Of what is added to the matrix; 0: nothing is."""
        ...

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """The new weight, from the base's in float32, which may be changed in place; both in the files' layout.

        Raises:
            UserError: it is :attr:`not_merged`.
        """
        ...

    def merged_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """The new bias, from the base's in float32."""
        ...

    def as_lora(self) -> AdapterWeights | None:
        """The same function as W0 + B A; None where it is no such sum of low rank."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that adapter.safetensors keeps of it, by kind; {}: the matrix is as it was."""
        ...

    def settings(self) -> dict[str, Any]:
        """What adapter.json keeps for all matrices together, plain data."""
        ...

    @classmethod
    def shapes(cls, matrix: Matrix, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shape of each of :meth:`tensors`; arguments and errors as of :meth:`read`."""
        ...

    @classmethod
    def read(
        cls, matrices: Sequence[Matrix], tensors: Mapping[str, Mapping[str, torch.Tensor]], settings: Mapping[str, Any]
    ) -> list[Update]:
        """All that an adapter folder holds.

        Args:
            matrices: in its order.
            tensors: of each matrix by its name, what :meth:`tensors` gave, in their :meth:`shapes`.
            settings: read from the folder, which may be anybody's.

        Raises:
            UserError: the settings are not what :meth:`settings` says.
        """
        ...


def weight_shape(update: Update) -> tuple[int, int]:
    """Shape of the base's weight in its files."""
    d_out, d_in = update.matrix.shape
    return (d_in, d_out) if update.matrix.is_transposed else (d_out, d_in)


@dataclass(frozen=True)
class AdapterWeights:
    """The active triplets of one matrix, on the CPU, float32: P (d_out, k), lam (k,), Q (k, d_in)."""

    name: str
    P: torch.Tensor
    lam: torch.Tensor
    Q: torch.Tensor
    scale: float
    weight_is_transposed: bool
    """Whether the base stores its weight as (d_in, d_out), as transformers' Conv1D does."""

    method: ClassVar[str] = ""
    formula: ClassVar[str] = "W = W0 + scale * P diag(lam) Q"
    changes_bias: ClassVar[bool] = False
    not_merged: ClassVar[str] = ""

    @property
    def rank(self) -> int:
        """Number of active triplets, k."""
        return self.lam.numel()

    @property
    def matrix(self) -> Matrix:
        return Matrix(self.name, (len(self.P), self.Q.shape[1]), self.rank, self.scale, self.weight_is_transposed)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the base's weight."""
        return weight_shape(self)

    def add_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Add s P diag(lambda) Q to a float32 weight in the layout of the base's, in place."""
        p = self.P * (self.scale * self.lam)
        return weight.addmm_(self.Q.T, p.T) if self.weight_is_transposed else weight.addmm_(p, self.Q)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        return self.add_to(weight)

    def merged_bias(self, bias: torch.Tensor) -> torch.Tensor:
        return bias

    def delta(self) -> torch.Tensor:
        """s P diag(lambda) Q in the layout of the base's weight, float32."""
        return self.add_to(torch.zeros(self.weight_shape))

    def as_lora(self) -> AdapterWeights:
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"P": self.P, "lam": self.lam, "Q": self.Q} if self.rank else {}

    def settings(self) -> dict[str, Any]:
        return {}

    @classmethod
    def shapes(cls, matrix: Matrix, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        return _shapes(matrix) if matrix.rank else {}

    @classmethod
    def read(
        cls, matrices: Sequence[Matrix], tensors: Mapping[str, Mapping[str, torch.Tensor]], settings: Mapping[str, Any]
    ) -> list[Update]:
        found: list[Update] = []
        for matrix in matrices:
            empty = {kind: torch.empty(shape) for kind, shape in _shapes(matrix).items()} if not matrix.rank else {}
            parts = {**empty, **tensors[matrix.name]}
            found.append(cls(matrix.name, **parts, scale=matrix.scale, weight_is_transposed=matrix.is_transposed))
        return found


def _shapes(matrix: Matrix) -> dict[str, tuple[int, ...]]:
    (d_out, d_in), k = matrix.shape, matrix.rank
    return {"P": (d_out, k), "lam": (k,), "Q": (k, d_in)}
