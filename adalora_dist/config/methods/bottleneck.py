"""Settings of bottleneck adapters: Houlsby's, Pfeiffer's, AdapterDrop, and LLM-Adapters' series and parallel ones."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from adalora_dist.config.methods.base import ModulePatterns, SizedConfig

Activation = Literal["relu", "swish", "gelu", "tanh"]
BottleneckInit = Literal["normal", "truncated", "zero"]


class BottleneckConfig(SizedConfig):
    """One whose adapters are U f(D x): down to a few numbers, through a non-linear function, and up again."""

    bottleneck_size: int = Field(64, ge=1)
    """Numbers between the two maps of an adapter."""
    positions: ModulePatterns = Field(("published",), min_length=1)
    """Matrices to adapt, by name; published: those that the method is known with (docs/methods.md)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the adapter branch (the paper uses 0)."""
    activation: Activation
    """The non-linear function."""
    adapter_biases: bool
    """Whether both maps of an adapter have biases."""
    bottleneck_init: BottleneckInit
    """Start of D and U: normal N(0, 0.02^2), truncated N(0, 0.01^2) within two sd, or normal with U = 0, so that the
    model is what it was."""

    formats: ClassVar[frozenset[str]] = frozenset()
    formats_from_files: ClassVar[frozenset[str]] = frozenset()
    has_adapters: ClassVar[bool] = True
    sized_by: ClassVar[tuple[str, ...]] = ("bottleneck_size",)

    @property
    def size(self) -> str:
        return f"width {self.bottleneck_size}"


class HoulsbyConfig(BottleneckConfig):
    """two bottleneck adapters per layer, behind attention and feed-forward"""

    method: Literal["houlsby"] = "houlsby"
    activation: Activation = "swish"
    adapter_biases: bool = True
    bottleneck_init: BottleneckInit = "truncated"


class PfeifferConfig(BottleneckConfig):
    """one bottleneck adapter per layer, behind the feed-forward"""

    method: Literal["pfeiffer"] = "pfeiffer"
    bottleneck_size: int = Field(48, ge=1)
    activation: Activation = "relu"
    adapter_biases: bool = True
    bottleneck_init: BottleneckInit = "normal"


class AdapterDropConfig(BottleneckConfig):
    """bottleneck adapters that the lowest layers are without"""

    method: Literal["adapterdrop"] = "adapterdrop"
    bottleneck_size: int = Field(48, ge=1)
    activation: Activation = "relu"
    adapter_biases: bool = True
    bottleneck_init: BottleneckInit = "normal"
    placement: Literal["pfeiffer", "houlsby"] = "pfeiffer"
    """Whose positions the adapters have."""
    drop_layers: int = Field(5, ge=0)
    """n, a number of layers, counted from the lowest."""
    drop: Literal["fixed", "random"] = "fixed"
    """fixed: the lowest n layers have no adapters; random: all have, and those of the lowest 0 to n, a number drawn for
    every step, are left out of it."""


class SeriesConfig(BottleneckConfig):
    """one bottleneck adapter per layer in a row with the feed-forward, as in LLM-Adapters"""

    method: Literal["series"] = "series"
    bottleneck_size: int = Field(256, ge=1)
    activation: Activation = "tanh"
    adapter_biases: bool = False
    bottleneck_init: BottleneckInit = "normal"
    side: Literal["behind", "before"] = "behind"
    """Whether adapters change what their matrices give or what they read."""


class ParallelConfig(BottleneckConfig):
    """bottleneck adapters beside the two matrices of the feed-forward, as in LLM-Adapters"""

    method: Literal["parallel"] = "parallel"
    bottleneck_size: int = Field(256, ge=1)
    activation: Activation = "tanh"
    adapter_biases: bool = False
    bottleneck_init: BottleneckInit = "normal"
