"""Prefix tuning (arXiv 2101.00190): in every layer, learnt keys and values of n positions stand before the text's own.

They enter as a cache of transformers' that is filled before the backbone's forward, as PEFT does it: attention sees n
more positions, the text's own positions begin at n, and there are no logits, nor losses, of the prefix. While a text is
generated the cache is the one that grows, filled when it is still empty.

With a hidden size keys and values are outer tanh(inner e + c) + d of an embedding e of each position, which trains more
steadily (section 4.3); what is kept in the end are keys and values.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from adalora_dist.backbones.parts import backbone_of
from adalora_dist.config.methods.prefix import PrefixConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adapter import device_of, lora_start
from adalora_dist.methods.prefix_caches import Heads, cache_argument, heads_of, text_config
from adalora_dist.methods.prefix_text import PrefixStep
from adalora_dist.methods.protocol import Adapter, Method, Step, adapters_of
from adalora_dist.methods.sizes import Sizes
from adalora_dist.methods.update import Matrix, OfMatrix, Update

_LEAF = "prefix"


class Prefix(Adapter):
    """Beside the layers of a backbone, which it serves through a hook on the backbone's forward.

    Parameters (float32):
        embedding: (n, 2 x layers x heads x head size), 0: of each position keys and values layer by layer, as PEFT's
            encoder has them. With ``inner_size``: (n, heads x head size), and
        inner, inner_bias, outer, outer_bias: (inner_size, heads x head size), (inner_size,), (2 x layers x heads x head
            size, inner_size) and (2 x layers x heads x head size,).
    """

    def __init__(
        self, name: str, backbone: nn.Module, length: int, heads: Heads, inner_size: int | None = None
    ) -> None:
        super().__init__()
        self.name, self.heads, self.hidden_size = name, heads, text_config(backbone).hidden_size
        self.length, self.inner_size = length, inner_size
        self._read: list[Any] | None = None
        shapes = encoder_shapes(length, heads, inner_size)
        for kind, shape in shapes.items():
            zeros = torch.zeros(shape, dtype=torch.float32, device=device_of(backbone))
            self.register_parameter(kind, nn.Parameter(zeros))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Embeddings ~ N(0, 1), maps as PyTorch's own, U(-a, a) with a = 1/sqrt(d_in); drawn on the CPU."""
        for kind, parameter in self.named_parameters(recurse=False):
            if kind == "embedding":
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            else:
                num_read = getattr(self, kind.removesuffix("_bias")).shape[1]
                parameter.copy_(lora_start(parameter.shape, num_read, generator))

    embedding: nn.Parameter

    def forward(self, batch: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of each layer, (batch, heads, n, head size).

        Args:
            dtype: that the backbone computes in; where an engine has cast the embedding already (FSDP2's policy for
                mixed precision), its own counts.
        """
        dtype = dtype if self.embedding.dtype == torch.float32 else self.embedding.dtype
        shape = (-1, 2 * self.heads.num_layers, self.heads.num_heads, self.heads.head_size)
        made = encoded(dict(self.named_parameters(recurse=False)))
        parts = made.to(dtype).view(shape).permute(1, 2, 0, 3).unsqueeze(1).expand(-1, batch, -1, -1, -1)
        return list(zip(parts[::2], parts[1::2], strict=True))

    def serve(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook of the backbone."""
        from transformers import DynamicCache

        if backbone.training and getattr(backbone, "gradient_checkpointing", False):
            raise UserError(
                "method=prefix with gradient checkpointing: transformers drops the cache that holds the prefix when it "
                "computes a layer again: leave checkpointing off"
            )
        names = list(inspect.signature(type(backbone).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        argument = cache_argument(backbone)
        tokens = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        cache = given.get(argument)
        if cache is None:
            cache = given[argument] = DynamicCache(config=cast(Any, backbone).config)
        if self._read is not None:
            self._read.append(cache)
            return (), given
        if not isinstance(cache, DynamicCache):
            raise UserError(f"method=prefix: a {type(cache).__name__} cannot be filled beforehand: use DynamicCache")
        if not cache.get_seq_length():
            device = tokens.device.type
            dtype = cast(Any, backbone).get_input_embeddings().weight.dtype
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
            for layer, (keys, values) in enumerate(self(len(tokens), dtype)):
                cache.update(keys, values, layer)
        mask = given.get("attention_mask")
        if mask is not None:
            if mask.dim() != 2:
                raise UserError(
                    f"method=prefix: attention_mask has {mask.dim()} dimensions, and only one of (batch, tokens) can "
                    "be made longer: use attn_implementation sdpa or eager"
                )
            given["attention_mask"] = torch.cat((mask.new_ones(len(mask), self.length), mask), dim=1)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + self.length
        return (), given

    @contextmanager
    def reading(self) -> Iterator[list[Any]]:
        """In it the model is the plain one, and the caches that its forwards fill are kept in the list."""
        self._read = []
        try:
            yield self._read
        finally:
            self._read = None

    def adapts(self) -> list[tuple[nn.Module, str]]:
        return []

    def description(self) -> dict[str, Any]:
        sizes = {"d_out": self.heads.width, "d_in": self.hidden_size, "init_rank": self.length}
        encoder = {} if self.inner_size is None else {"inner_size": self.inner_size}
        return sizes | {"scale": 1.0, "is_transposed": False} | self.heads._asdict() | encoder


def encoder_shapes(length: int, heads: Heads, inner_size: int | None) -> dict[str, tuple[int, ...]]:
    """Of the parameters of a :class:`Prefix`, by their names."""
    if inner_size is None:
        return {"embedding": (length, heads.width)}
    read = heads.num_heads * heads.head_size
    maps = {"inner": (inner_size, read), "outer": (heads.width, inner_size)}
    biases = {f"{kind}_bias": shape[:1] for kind, shape in maps.items()}
    return {"embedding": (length, read), **maps, **biases}


def encoded(parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Keys and values, (n, 2 x layers x heads x head size), of the parameters of a :class:`Prefix`."""
    made = parts["embedding"]
    if "inner" in parts:
        hidden = nn.functional.linear(made, parts["inner"], parts["inner_bias"]).tanh()
        made = nn.functional.linear(hidden, parts["outer"], parts["outer_bias"])
    return made


@dataclass(frozen=True)
class PrefixUpdate(OfMatrix):
    """embedding: (n, 2 x layers x heads x head size)."""

    matrix: Matrix
    heads: Heads
    embedding: torch.Tensor

    method: ClassVar[str] = "prefix"
    formula: ClassVar[str] = "keys and values of n positions before the text, layer by layer"

    not_merged: ClassVar[str] = (
        "a prefix is no matrix and cannot be merged: use PEFT's form (--to peft), or put it into its base model with "
        "load_adapter(model, folder)"
    )

    def settings(self) -> dict[str, Any]:
        return self.heads._asdict()

    @classmethod
    def shapes(cls, matrix: Matrix, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        heads = _checked(settings)
        if heads.width != matrix.shape[0] or not matrix.rank:
            raise UserError(
                f"adapter.json: {matrix.rank} positions of {matrix.shape[0]} numbers, settings say {heads.width}: copy "
                "it again"
            )
        return {"embedding": (matrix.rank, heads.width)}

    @classmethod
    def read(
        cls, matrices: Sequence[Matrix], tensors: Mapping[str, Mapping[str, torch.Tensor]], settings: Mapping[str, Any]
    ) -> list[Update]:
        heads = _checked(settings)
        return [cls(matrix, heads, **tensors[matrix.name]) for matrix in matrices]


def _checked(settings: Mapping[str, Any]) -> Heads:
    values = [settings.get(name) for name in Heads._fields]
    if any(type(value) is not int or value < 1 for value in values):
        raise UserError(
            f"adapter.json: settings: {', '.join(Heads._fields)} are {values!r:.80}, must be integers >= 1: copy it "
            "again"
        )
    return Heads(*cast(list[int], values))


class PrefixTuning(Method):
    """One adapter for the whole model."""

    config: PrefixConfig
    update = PrefixUpdate
    said = "Prefix tuning ([arXiv 2101.00190](https://arxiv.org/abs/2101.00190))"

    def adapt(self, model: nn.Module, generator: torch.Generator) -> list[Adapter]:
        heads, name = heads_of(model), _name(model)
        adapter = _put(model, name, self.config.prefix_length, heads, self.config.prefix_hidden_size)
        if self.config.prefix_init == "normal" or self.config.prefix_hidden_size is not None:
            adapter.reset(generator)
        return [adapter]

    def sizes(self, model: nn.Module) -> Sizes:
        heads, limit = heads_of(model), text_config(backbone_of(model)).max_position_embeddings

        def count(length: int) -> int:
            shapes = encoder_shapes(length, heads, self.config.prefix_hidden_size)
            return sum(math.prod(shape) for shape in shapes.values())

        return Sizes(count, lambda length: {"prefix_length": length}, limit, "all of its positions")

    def undecayed(self, model: nn.Module) -> list[torch.Tensor]:
        """Biases of the MLP."""
        own = [p for adapter in adapters_of(model) for p in adapter.named_parameters(recurse=False)]
        return [parameter for kind, parameter in own if kind.endswith("_bias")]

    def step(self, adapters: Sequence[Adapter], total_steps: int) -> Step:
        return PrefixStep(adapters, self.config.prefix_text is not None)

    @classmethod
    def updates(
        cls,
        described: Mapping[str, Mapping[str, Any]],
        held: Mapping[str, Sequence[int]],
        keep: torch.Tensor | None,
        whole: Callable[[str], torch.Tensor | None],
    ) -> Sequence[Update]:
        """Keys and values themselves, whatever made them."""
        found: list[Update] = []
        for name, about in described.items():
            heads = _checked(about)
            kinds = encoder_shapes(about["init_rank"], heads, about.get("inner_size"))
            parts = {kind: cast(torch.Tensor, whole(f"{name}.{kind}")) for kind in kinds}
            found.append(PrefixUpdate(Matrix.described(name, about), heads, encoded(parts)))
        return found

    @classmethod
    def shapes_in(cls, model: nn.Module) -> Callable[[str], tuple[int, int] | None]:
        """(hidden size, numbers per position)."""
        own, config = _name(model), text_config(backbone_of(model))
        return lambda name: (config.hidden_size, heads_of(model).width) if name == own else None

    @classmethod
    @torch.no_grad()
    def place(cls, model: nn.Module, updates: Sequence[Update]) -> list[Adapter]:
        [update] = cast(Sequence[PrefixUpdate], updates)
        adapter = _put(model, update.name, update.rank, update.heads)
        adapter.embedding.copy_(update.embedding)
        return [adapter]


def _name(model: nn.Module) -> str:
    backbone = backbone_of(model)
    path = next(name for name, module in model.named_modules() if module is backbone)
    return f"{path}.{_LEAF}" if path else _LEAF


def _put(model: nn.Module, name: str, length: int, heads: Heads, inner_size: int | None = None) -> Prefix:
    backbone = backbone_of(model)
    if hasattr(backbone, _LEAF):
        raise UserError("the model already has a prefix: take the plain backbone")
    adapter = Prefix(name, backbone, length, heads, inner_size)
    adapter.train(model.training)
    setattr(backbone, _LEAF, adapter)
    backbone.register_forward_pre_hook(adapter.serve, with_kwargs=True)
    return adapter
