"""Experts of one layer as stacks: parameters of three dimensions, one matrix for each expert. What is one, and how it
is computed beside additions to it: asked here only.

transformers keeps the experts of a layer in one module, which is given tokens and where they are to go. Every class of
them that carries its ``use_experts_implementation`` says by attributes how its stacks lie (transposed, with biases,
gated) and computes the same function, whichever kernel was chosen for it. Llama 4's, which is given the tokens once for
every expert, is known by its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from adalora_dist.backbones.linears import is_plain_linear
from adalora_dist.io.errors import UserError
from adalora_dist.sharding.tensors import full_shape

Add = Callable[[str, torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]
"""(leaf, x, offsets, y) -> y and what is added to it; see :func:`grouped_product` for x and offsets. May change y."""

_OF_ALL_TOKENS = ("Llama4TextExperts",)
"""Classes whose forward takes every token once for each expert, (experts * tokens, d), and nothing else."""


class ExpertStack(NamedTuple):
    """The matrices of one projection of all experts of a layer, which are one parameter."""

    name: str
    """Of the parameter in the plain model."""
    num_experts: int
    d_in: int
    d_out: int
    is_transposed: bool
    """Whether a matrix lies as (d_in, d_out)."""

    @property
    def owner(self) -> str:
        """Name of the module that holds it."""
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    def matrix_names(self) -> list[str]:
        """What each expert's matrix is called: ``layers.0.mlp.experts.3.down_proj``."""
        return [f"{self.owner}.{expert}.{self.leaf}" for expert in range(self.num_experts)]


def place_of(matrix: str) -> tuple[str, int] | None:
    """(name of the stack, expert) of a matrix with a name as :meth:`ExpertStack.matrix_names` gives; None: no such."""
    found = re.fullmatch(r"(.+)\.(\d+)\.([^.]+)", matrix)
    return (f"{found[1]}.{found[3]}", int(found[2])) if found else None


def stacks_of(model: nn.Module) -> list[ExpertStack]:
    """All stacks that something can be added to, in the order of ``model.named_modules()``."""
    return [stack for name, module in model.named_modules() for stack in _stacks(name, module)]


def _stacks(name: str, module: nn.Module) -> Iterator[ExpertStack]:
    of_all_tokens = type(module).__name__ in _OF_ALL_TOKENS
    if not of_all_tokens and not all(hasattr(module, a) for a in ("has_gate", "is_transposed", "_apply_gate")):
        return
    for leaf in (_entrance(module), "down_proj"):
        weight = module._parameters.get(leaf)
        if weight is None or len(full_shape(weight)) != 3 or weight.element_size() == 1:  # packed
            continue
        is_transposed = of_all_tokens or bool(module.is_transposed)
        num_experts, *sizes = full_shape(weight)
        d_in, d_out = sizes if is_transposed else reversed(sizes)
        yield ExpertStack(f"{name}.{leaf}" if name else leaf, num_experts, d_in, d_out, is_transposed)


def _entrance(module: nn.Module) -> str:
    return "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"


def unlike_linears(model: nn.Module) -> Iterator[str]:
    """Parameters of experts that are no linear map's: stacks, and what DBRX and JetMoE keep. May be on meta."""
    for name, module in model.named_modules():
        if "expert" in f"{name}.{type(module).__name__}".lower() and not is_plain_linear(module):
            yield from (f"{name}.{leaf}" for leaf, p in module.named_parameters(recurse=False) if p.dim() > 1)


def run_with(experts: Any, add: Add) -> None:
    """Have ``experts`` add to what their stacks give: from now on they are computed grouped, by expert.

    Tokens are sorted by expert, so that each projection is one grouped product, as in transformers' ``grouped_mm``;
    what the other implementations give differs from it in rounding alone. A frozen stack is saved for no backward: its
    gradient is not made, and an engine that gathers it can let it go.

    Args:
        experts: the module that holds the stacks.
        add: called for every projection.

    Raises:
        UserError: experts are spread over processes.
    """
    if getattr(experts, "_is_expert_parallel", False):
        raise UserError(
            f"{type(experts).__name__}: experts are spread over processes (expert parallelism), where none holds all "
            "experts of an adapter: leave out tp_plan and ep_plan, and shard with FSDP2 or ZeRO"
        )
    of_all_tokens = type(experts).__name__ in _OF_ALL_TOKENS
    experts.forward = partial(_of_all_tokens if of_all_tokens else _routed, experts, add)


def _routed(
    experts: Any, add: Add, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """(tokens, d) -> (tokens, d), each token by its k experts, (tokens, k), in the shares of ``top_k_weights``."""
    num_tokens, top_k = top_k_index.shape
    expert_of_row, order = torch.sort(top_k_index.reshape(-1), stable=True)
    numbers = torch.arange(experts.num_experts, device=order.device)
    offsets = torch.searchsorted(expert_of_row, numbers.to(expert_of_row.dtype), right=True, out_int32=True)

    def project(leaf: str, x: torch.Tensor) -> torch.Tensor:
        weight = getattr(experts, leaf)
        x = x.to(weight.dtype)
        y = _product(experts, leaf, x, offsets)
        if experts.has_bias:
            y = y.add_(getattr(experts, f"{leaf}_bias")[expert_of_row])
        return add(leaf, x, offsets, y)

    y = project(_entrance(experts), hidden_states[order // top_k])
    y = project("down_proj", experts._apply_gate(y) if experts.has_gate else experts.act_fn(y))
    if experts.has_post_expert_norm:
        y = experts.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return y[place].view(num_tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)


def _of_all_tokens(experts: Any, add: Add, hidden_states: torch.Tensor) -> torch.Tensor:
    """(experts * tokens, d) -> the same: a token is 0 for an expert that it does not go to."""
    x = hidden_states.view(experts.num_experts, -1, experts.hidden_size)
    y = add("gate_up_proj", x, None, torch.bmm(x, experts.gate_up_proj))
    gate, up = y.chunk(2, dim=-1)
    x = up * experts.act_fn(gate)
    y = add("down_proj", x, None, torch.bmm(x, experts.down_proj))
    return y.view(-1, experts.hidden_size)


def _product(experts: Any, leaf: str, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    weight = getattr(experts, leaf)
    if weight.requires_grad or torch.compiler.is_compiling():
        return grouped_product(x, _as_maps(experts, leaf), offsets)
    apply: Callable[..., torch.Tensor] = _FrozenProduct.apply
    return apply(x, experts, leaf, offsets)


def _as_maps(experts: Any, leaf: str) -> torch.Tensor:
    """The stack as (experts, d_in, d_out)."""
    weight: torch.Tensor = getattr(experts, leaf)
    return weight if experts.is_transposed else weight.transpose(1, 2)


class _FrozenProduct(torch.autograd.Function):
    """y = x W and dx = dy W^T by expert, W read from the module both times, as the engine has it by then."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, experts: Any, leaf: str, offsets: torch.Tensor) -> torch.Tensor:
        ctx.experts, ctx.leaf, ctx.offsets = experts, leaf, offsets
        return grouped_product(x, _as_maps(experts, leaf), offsets)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        # Autocast, which is not in force any more, may have made the forward's product in another type than W's.
        maps = _as_maps(ctx.experts, ctx.leaf).transpose(1, 2).to(grads[0].dtype)
        return grouped_product(grads[0].contiguous(), maps, ctx.offsets), None, None, None


def grouped_product(x: torch.Tensor, maps: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """x[rows of expert e] @ maps[e] for every expert.

    Args:
        x: (rows, d_in), sorted by expert.
        maps: (experts, d_in, d_out), any strides.
        offsets: (experts,) int32, where the rows of each expert end. An expert without rows has a gradient of 0.
    """
    if _has_kernel(x, maps):
        return F.grouped_mm(x, maps, offs=offsets)
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):  # no values that a loop could go by
        import transformers.integrations.moe  # noqa: F401 (defines the operation)

        y: torch.Tensor = torch.ops.transformers.grouped_mm_fallback(x, maps, offsets)
        return y
    stops = offsets.tolist()
    rows = zip(maps.unbind(0), [0, *stops], stops, strict=False)
    return torch.cat([x[start:stop] @ matrix for matrix, start, stop in rows if stop > start])


def _has_kernel(x: torch.Tensor, maps: torch.Tensor) -> bool:
    """Whether torch's grouped product takes these: a type and strides, in whole 16 bytes, that it knows."""
    if not hasattr(F, "grouped_mm") or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
        return False
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    unit = 16 // x.element_size()
    return not any(d % unit for d in maps.shape[1:]) and all(_is_aligned(t, unit) for t in (x, maps))


def _is_aligned(matrices: torch.Tensor, unit: int) -> bool:
    *batch, row, column = matrices.stride()
    return (row, column).count(1) == 1 and not any(stride % unit for stride in (*batch, max(row, column)))
