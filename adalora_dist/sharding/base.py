"""What an engine answers about adapter parameters. This is the whole surface.

A rank holds of every parameter one contiguous span of the flattened (row-major) full tensor: all of it (one
process, DDP), a block of rows (FSDP2), a flat slice (ZeRO), or nothing. Everything else in the method sees
spans and flat values only; see ``docs/sharding.md`` for the drawing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import get_total_norm

from adalora_dist.sharding.optimizer_state import State as State
from adalora_dist.sharding.spans import Span as Span


class ShardEngine(Protocol):
    """One training engine, seen from the innermost optimizer's step hooks, and between two steps.

    Constructed after the engine has taken the parameters over, from any of the trainable parameters in a fixed order
    that is the same on every rank, and from an optimizer as :func:`adalora_dist.sharding.select_engine` describes it.
    Raises UserError if the engine holds these parameters in a way that is not supported.
    """

    shard_group: dist.ProcessGroup | None
    """Ranks that together hold one copy of every parameter; None where each rank holds all of it."""
    num_firings: int
    """How often the optimizer's step fires per training step (ZeRO: once per parameter group or sub-group)."""

    def __init__(self, params: Sequence[torch.Tensor], optimizer: Any) -> None: ...

    @classmethod
    def claims(cls, params: Sequence[torch.Tensor], optimizer: Any) -> bool:
        """Whether it is this engine that has taken over ``params``; arguments as of the constructor. No collective.

        Also if it has taken over some of them only: the constructor then says what is wrong.
        """
        ...

    def spans(self) -> list[Span]:
        """The span of each parameter that this rank's optimizer updates. Constant during a run."""
        ...

    def values(self) -> list[torch.Tensor]:
        """Per parameter the local span as the optimizer updates it (the fp32 master where there is one).

        The tensors themselves or views, not copies; of any shape whose row-major order is the span's.
        """
        ...

    def gradients(self) -> list[torch.Tensor | None]:
        """Per parameter the gradient that the step about to run will consume, to be changed in place.

        Shapes are those of :meth:`values`. A parameter that received no gradient gets zeros. None: not part of this
        firing.
        """
        ...

    def nonfinite(self) -> torch.Tensor:
        """float32 scalar > 0 if any gradient of this training step that this rank holds is nan or inf.

        Asked at the first firing; covers every parameter of the optimizer, not the adapters alone.
        """
        ...

    def skip_firing_if(self, flag: torch.Tensor) -> None:
        """Where ``flag`` is 1 (else 0; float32 scalar), make the firing about to run change nothing.

        Neither weights nor optimizer state. The flag is read on the host only if the optimizer cannot look at it on the
        device. Ask last in a pre hook: the gradients may be gone afterwards.
        """
        ...

    def write(self, indices: Sequence[int], values: Sequence[torch.Tensor]) -> None:
        """Set local spans of some parameters so that the next forward sees them and the next step keeps them.

        Only inside the post hook of a training step's last firing: the engine then sends new values to the ranks
        that read them. No collective.
        """
        ...

    def shapes(self) -> list[torch.Size]:
        """The full shape of each parameter."""
        ...

    def states(self) -> list[State]:
        """Per parameter the optimizer's state of the local span, as views where it has an entry per weight.

        Raises:
            UserError: the optimizer keeps something else than an entry per weight, in blocks for instance.
        """
        ...

    def restore(self, values: Sequence[torch.Tensor], states: Sequence[State]) -> None:
        """Between two steps, set the local span of every parameter, in all its copies, and the optimizer's state of it.

        State that the optimizer has not made yet is made as its first step would. Collective: the engine sends new
        values to the ranks that read them.

        Raises:
            UserError: as of :func:`adalora_dist.sharding.optimizer_state.ready_state`, or the optimizer keeps other
                state; parameters that share one step counter in this engine come with different ones.
        """
        ...

    def neighbours(self) -> list[torch.Tensor]:
        """Other trained parameters that lie in the same buffers, and so lose their values, too, in :meth:`shrink`."""
        ...

    def shrink(self, model: nn.Module, optimizer: Any, shrinks: Sequence[Shrink]) -> None:
        """Between two steps, put smaller parameters, all 0, in the place of those there are; then this engine is void.

        In the model, in the torch optimizer, in the engine's own buffers. Values and optimizer state of all that this
        engine holds are lost: :func:`adalora_dist.sharding.shrink.shrink_parameters` keeps and restores them.
        Gradients are dropped. Collective.

        Args:
            model: as the engine wraps it; stays the same object.
            optimizer: any wrapper of the torch optimizer, or that; stays the same object, and what it wraps too, but
                for what the engine has to make anew.
            shrinks: of parameters that this engine holds.

        Raises:
            UserError: model or optimizer are set up in a way that cannot be repeated. Nothing has been changed then.
        """
        ...

    def retire(self) -> None:
        """Take this engine's hooks off the optimizer, because another engine takes over."""
        ...

    def full(self, index: int) -> torch.Tensor:
        """The whole parameter, float32, in its full shape, on every rank. Collective; for reports and export."""
        ...


def innermost(optimizer: Any) -> Any:
    """The torch optimizer at the end of a chain of wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def num_missing(params: Sequence[torch.Tensor], optimizer: Any) -> int:
    """How many of ``params`` are not among those that the innermost optimizer updates."""
    groups = getattr(innermost(optimizer), "param_groups", ())
    updated = {id(p) for group in groups for p in group["params"]}
    return sum(id(p) not in updated for p in params)


class Shrink(NamedTuple):
    """A parameter that is to lose some of its columns (the last dimension); with none left it is removed."""

    module: nn.Module
    name: str
    columns: torch.Tensor
    """Indices of the columns that stay."""

    @property
    def parameter(self) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self.module, self.name)
        return parameter

    def select(self) -> None:
        """Put what stays of the parameter in its place. For one that no engine and no optimizer has taken over."""
        old = self.parameter
        if len(self.columns):
            chosen = old.detach().index_select(-1, self.columns.to(old.device))
            setattr(self.module, self.name, nn.Parameter(chosen, requires_grad=old.requires_grad))
        else:
            delattr(self.module, self.name)

    def replace(self, shape: torch.Size, optimizer: torch.optim.Optimizer, **options: Any) -> nn.Parameter | None:
        """Put a smaller parameter of zeros in its place, in the module and in the optimizer's group; return it.

        Args:
            shape: the full shape of the parameter that there is.
            options: dtype and device.
        """
        old, new = self.parameter, None
        if len(self.columns):
            zeros = torch.zeros(*shape[:-1], len(self.columns), **options)
            new = nn.Parameter(zeros, requires_grad=old.requires_grad)
            setattr(self.module, self.name, new)
        else:
            delattr(self.module, self.name)
        replace_in_optimizer(optimizer, old, new)
        return new


def replace_in_optimizer(optimizer: torch.optim.Optimizer, old: torch.Tensor, new: torch.Tensor | None) -> None:
    """``optimizer`` goes on with ``new`` in the place of ``old`` (None: without), and forgets its state."""
    optimizer.state.pop(old, None)
    for group in optimizer.param_groups:
        for index, p in enumerate(group["params"]):
            if p is old:
                group["params"][index : index + 1] = [] if new is None else [new]
                break


def nonfinite_flag(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """float32 scalar: 1 if any of the (local) tensors holds a nan or an inf, else 0. No host synchronisation.

    A gradient beyond 1.8e19 counts as infinite, because its square is: Adam would keep that as its second moment.
    (The largest absolute value would be as good a witness, but is several times slower to find on a CPU.)
    """
    present = [g for g in gradients if g.numel()]
    return (~torch.isfinite(get_total_norm(present, 2.0))).float()


def optimizer_gradients(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every gradient that the optimizer's next step will consume, adapters or not."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def skip_step_if(optimizer: torch.optim.Optimizer, flag: torch.Tensor) -> None:
    """Where ``flag`` (float32 scalar, 1 or 0) is 1, the optimizer's next step leaves weights and state untouched.

    Fused Adam and AdamW look at the flag inside their kernel, as they do for loss scaling; so does a subclass that says
    ``looks_at_found_inf``. (Fused SGD would, too, but its momentum is uninitialised memory if the first step is
    skipped.) For others the host reads it: torch optimizers pass over a parameter whose gradient is None.
    """
    looks_itself = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)  # a subclass may have a step of its own
    looks_itself |= getattr(optimizer, "looks_at_found_inf", False)
    if looks_itself and all(group["fused"] for group in optimizer.param_groups):
        optimizer.found_inf = flag  # type: ignore[attr-defined]
    elif flag.item():
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None


def assemble(local: torch.Tensor, span: Span, shape: torch.Size, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The full float32 tensor of which this rank holds ``span``: every rank's span, summed over ``group``."""
    full = torch.zeros(shape.numel(), dtype=torch.float32, device=local.device)
    full[span.start : span.stop] = local
    return sum_over(group, full).view(shape)


def spans_of_ranks(engine: ShardEngine) -> list[list[Span]]:
    """Of every rank of the shard group, in its order, the span of each parameter. Collective."""
    if engine.shard_group is None:
        return [engine.spans()]
    found: list[list[Span]] = [[]] * dist.get_world_size(engine.shard_group)
    dist.all_gather_object(found, engine.spans(), group=engine.shard_group)
    return found


def is_first_of_group(engine: ShardEngine) -> bool:
    """Whether this rank is the first of those that hold one copy: it writes what all of them have."""
    return engine.shard_group is None or dist.get_rank(engine.shard_group) == 0


def sum_over(group: dist.ProcessGroup | None, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` summed over ``group``, in place where possible; unchanged for None.

    A CPU tensor in a group that only moves CUDA tensors (parameters offloaded to the CPU) takes the way over the GPU.
    """
    if group is None or dist.get_world_size(group) == 1:
        return tensor
    if tensor.device.type == "cpu" and dist.get_backend(group) == "nccl":
        on_device = tensor.cuda()
        dist.all_reduce(on_device, group=group)
        return on_device.to(tensor.device)
    dist.all_reduce(tensor, group=group)
    return tensor


def agree_on(numbers: torch.Tensor, tolerance: float = 1e-3) -> bool:
    """Whether all processes have (about) the same ``numbers``, a float64 vector. Collective; reads from the device.

    Replicas on equal hardware have equal bits, on unequal hardware they drift apart.
    """
    if not dist.is_initialized():
        return True
    mean = sum_over(dist.group.WORLD, numbers.clone()) / dist.get_world_size()
    differs = ((numbers - mean).abs() > tolerance * (1 + mean.abs())).any().double()
    return bool(sum_over(dist.group.WORLD, differs) == 0)
