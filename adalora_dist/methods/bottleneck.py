"""Bottleneck adapters: f(h) = U act(D h + c_d) + c_u, of a few numbers in between.

houlsby (arXiv 1902.00751): h + f(h) for what attention and feed-forward give, before the residual is added.
pfeiffer (2005.00052): once per layer, at the feed-forward; where a layer ends in a norm of the residual sum z, f reads
that norm, and the layer gives norm(z + f(norm(z))); elsewhere as houlsby.
adapterdrop (2010.11918): either of them, without the lowest layers. series and parallel (2304.01933): h + f(h) behind
or before a matrix, and W x + f(x) beside it.

Such a function is no matrix, so nothing merges: an adapter folder and its loader are all there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast, get_args

import torch
from torch import nn

from adalora_dist.backbones.linears import norm_width
from adalora_dist.config.methods.bottleneck import Activation, AdapterDropConfig, BottleneckConfig, SeriesConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.bottleneck_layer import ACTIVATIONS, Bottleneck, Depth, DropStep, Form, widths
from adalora_dist.methods.branch import BranchStep, drawn_seed
from adalora_dist.methods.positions import find_parts, layer_of, norm_behind
from adalora_dist.methods.protocol import Adapter, Method, Step, adapters_of
from adalora_dist.methods.sites import find_targets, put_around
from adalora_dist.methods.sizes import Sizes, of_ranks
from adalora_dist.methods.update import Matrix, OfMatrix, Update


@dataclass(frozen=True)
class BottleneckUpdate(OfMatrix):
    """D (r, d_read), U (d_written, r), and c_d (r,), c_u (d_written,) or None."""

    matrix: Matrix
    form: Form
    activation: Activation
    D: torch.Tensor
    U: torch.Tensor
    c_d: torch.Tensor | None = None
    c_u: torch.Tensor | None = None

    method: ClassVar[str]
    formula: ClassVar[str] = "f(h) = U act(D h + c_d) + c_u, added to what the matrix gives or reads (form)"

    not_merged: ClassVar[str] = (
        "a bottleneck adapter is no matrix and cannot be merged: put it into its base model with load_adapter(model, "
        "folder)"
    )

    def settings(self) -> dict[str, Any]:
        return {"form": self.form, "activation": self.activation, "biases": self.c_d is not None}

    @classmethod
    def shapes(cls, matrix: Matrix, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        form, _, biases = _checked(settings)
        read, written = widths(form, matrix.shape)
        found: dict[str, tuple[int, ...]] = {"D": (matrix.rank, read), "U": (written, matrix.rank)}
        return found | ({"c_d": (matrix.rank,), "c_u": (written,)} if biases else {})

    @classmethod
    def read(
        cls, matrices: Sequence[Matrix], tensors: Mapping[str, Mapping[str, torch.Tensor]], settings: Mapping[str, Any]
    ) -> list[Update]:
        form, activation, _ = _checked(settings)
        return [cls(matrix, form, activation, **tensors[matrix.name]) for matrix in matrices]


def _checked(settings: Mapping[str, Any]) -> tuple[Form, Activation, bool]:
    form, activation, biases = (settings.get(name) for name in ("form", "activation", "biases"))
    if form not in get_args(Form) or activation not in ACTIVATIONS or not isinstance(biases, bool):
        raise UserError(
            f"adapter.json: settings: form {form!r:.50}, activation {activation!r:.50}, biases {biases!r:.50} must be "
            f"one of {', '.join(get_args(Form))}, one of {', '.join(ACTIVATIONS)}, and true or false: copy it again"
        )
    return cast(Form, form), cast(Activation, activation), biases


class BottleneckMethod(Method):
    """Adapters at :meth:`sites`, by default where they were published."""

    config: BottleneckConfig
    update: ClassVar[Any] = BottleneckUpdate

    def sites(self, model: nn.Module) -> dict[str, Form]:
        """Names of the modules to adapt, each with the form of its adapter."""
        asked = self.config.positions
        names = tuple(name for name in asked if name != "published")
        if "published" in asked:
            names += tuple(find_parts(model, self.config.method, self.parts))
        return dict.fromkeys(find_targets(model, names, "positions"), self.form)

    @property
    def parts(self) -> tuple[str, ...]:
        """Whose maps are adapted, as in ``positions.py``."""
        return ("feed-forward output",)

    @property
    def form(self) -> Form:
        return "behind"

    def depth(self, generator: torch.Generator) -> Depth | None:
        """What leaves layers out of steps; None: nothing does."""
        return None

    def adapt(self, model: nn.Module, generator: torch.Generator) -> list[Adapter]:
        config, depth, sites = self.config, self.depth(generator), self.sites(model)

        def make(base: nn.Module, name: str) -> Bottleneck:
            options = (sites[name], config.activation, config.adapter_biases, config.dropout, depth)
            return Bottleneck(base, name, config.bottleneck_size, *options)

        layers = put_around(model, sites, make)
        for layer in layers:
            layer.reset(config.bottleneck_init, generator)
        return list(layers)

    def sizes(self, model: nn.Module) -> Sizes:
        ends, shape = [], self.shapes_in(model)
        for name, form in self.sites(model).items():
            d_in, d_out = shape(name) or (0, 0)
            ends.append(widths(form, (d_out, d_in)))
        num_biases = len(ends) if self.config.adapter_biases else 0
        fixed = sum(written for _, written in ends) if num_biases else 0
        return of_ranks(ends, sum(map(sum, ends)) + num_biases, fixed, "bottleneck_size")

    def undecayed(self, model: nn.Module) -> list[torch.Tensor]:
        return [
            bias
            for layer in adapters_of(model)
            for kind in ("c_d", "c_u")
            if (bias := getattr(layer, kind)) is not None
        ]

    def step(self, adapters: Sequence[Adapter], total_steps: int) -> Step:
        layers = cast(Sequence[Bottleneck], adapters)
        depth = layers[0].depth
        return BranchStep(layers) if depth is None else DropStep(layers, depth)

    @classmethod
    def shapes_in(cls, model: nn.Module) -> Callable[[str], tuple[int, int] | None]:
        """A norm counts as a matrix from its width to its width."""
        found, modules = super().shapes_in(model), dict(model.named_modules())

        def shape(name: str) -> tuple[int, int] | None:
            width = norm_width(modules[name]) if name in modules else None
            return found(name) or (None if width is None else (width, width))

        return shape

    @classmethod
    def layer_of(cls, base: nn.Module, update: BottleneckUpdate) -> Bottleneck:
        biases = update.c_d is not None
        return Bottleneck(base, update.name, update.rank, update.form, update.activation, biases)


class HoulsbyUpdate(BottleneckUpdate):
    method = "houlsby"


class PfeifferUpdate(BottleneckUpdate):
    method = "pfeiffer"


class AdapterDropUpdate(BottleneckUpdate):
    method = "adapterdrop"


class SeriesUpdate(BottleneckUpdate):
    method = "series"


class ParallelUpdate(BottleneckUpdate):
    method = "parallel"


class Houlsby(BottleneckMethod):
    """Behind attention and feed-forward of every layer."""

    update = HoulsbyUpdate
    said = "Bottleneck adapters (Houlsby et al., [arXiv 1902.00751](https://arxiv.org/abs/1902.00751))"

    @property
    def parts(self) -> tuple[str, ...]:
        return ("attention output", "feed-forward output")


class Pfeiffer(BottleneckMethod):
    """At the feed-forward of every layer; in post-norm layers around the norm that ends them."""

    update = PfeifferUpdate
    said = "Bottleneck adapters (Pfeiffer et al., [arXiv 2005.00052](https://arxiv.org/abs/2005.00052))"

    def sites(self, model: nn.Module) -> dict[str, Form]:
        """
        Raises:
            UserError: some are around a norm and others are not, which one description cannot say.
        """
        found: dict[str, Form] = {}
        for name in super().sites(model):
            norm = norm_behind(model, name)
            found |= {name: "behind"} if norm is None else {norm: "norm"}
        by_form = {form: name for name, form in found.items()}
        if len(by_form) > 1:
            raise UserError(
                f"method={self.config.method}: positions have two forms of adapters, around a norm "
                f"({by_form['norm']}) and behind a matrix ({by_form['behind']}), and an adapter folder holds one: "
                "leave either out of positions, or set method to houlsby"
            )
        return found


class AdapterDrop(BottleneckMethod):
    """Pfeiffer's or Houlsby's, without the lowest layers."""

    config: AdapterDropConfig
    update = AdapterDropUpdate
    said = "Bottleneck adapters of the upper layers (AdapterDrop, [arXiv 2010.11918](https://arxiv.org/abs/2010.11918))"

    def sites(self, model: nn.Module) -> dict[str, Form]:
        placed: BottleneckMethod = (Pfeiffer if self.config.placement == "pfeiffer" else Houlsby)(self.config)
        sites = placed.sites(model)
        if self.config.drop == "random":
            return sites
        lowest = self.config.drop_layers
        kept: dict[str, Form] = {name: form for name, form in sites.items() if layer_of(name) >= lowest}
        if not kept:
            count = 1 + max(map(layer_of, sites))
            raise UserError(
                f"drop_layers={lowest}: {type(model).__name__} has {count} layers, so no adapter would be left: "
                f"must be from 0 to {count - 1}"
            )
        return kept

    def depth(self, generator: torch.Generator) -> Depth | None:
        if self.config.drop == "fixed":
            return None
        return Depth(self.config.drop_layers, drawn_seed(generator))


class Series(BottleneckMethod):
    """In a row with the feed-forward's output map, or with its input map in front."""

    config: SeriesConfig
    update = SeriesUpdate
    said = "Bottleneck adapters in series ([arXiv 2304.01933](https://arxiv.org/abs/2304.01933))"

    @property
    def parts(self) -> tuple[str, ...]:
        return ("feed-forward output",) if self.config.side == "behind" else ("feed-forward input",)

    @property
    def form(self) -> Form:
        return self.config.side


class Parallel(BottleneckMethod):
    """Beside both maps of the feed-forward."""

    update = ParallelUpdate
    said = "Bottleneck adapters in parallel ([arXiv 2304.01933](https://arxiv.org/abs/2304.01933))"

    @property
    def parts(self) -> tuple[str, ...]:
        return ("feed-forward input", "feed-forward output")

    @property
    def form(self) -> Form:
        return "beside"
