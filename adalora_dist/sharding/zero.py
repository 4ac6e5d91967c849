"""DeepSpeed ZeRO, stages 1, 2 and 3. The only file that knows DeepSpeed; it reads attributes and imports nothing.

ZeRO flattens parameters into one-dimensional *groups* (stages 1, 2: one per optimizer parameter group; stage 3: one
per sub-group), of which every rank owns a partition. The torch optimizer holds the partitions' *masters* (usually
fp32), not the model's parameters, and its step fires once per group, in order, with that group's gradient alone.

Stages 1, 2: the concatenated group is cut evenly, so a rank may own part of a parameter, all of it, or nothing.
(Stage 1 in bf16 with fp32 accumulation is a class of its own, ``BF16_Optimizer``: one firing for all groups.)
Stage 3: every parameter is cut for itself into ceil(numel / world) elements per rank; the end of the last chunk is
padding, and uninitialised in the master.

A value lives in two places, its master and the working copy that the forward reads. After a firing ZeRO copies that
group's masters to its working copies, and after the last firing it sends the working copies round (stages 1, 2: all
of them; stage 3: those it keeps whole on every rank). A write made before that point must change both: the copying
of earlier groups is over, that of the last is still to come.

Stage 3, and every stage with an offloaded optimizer, keep gradients in buffers that only a parameter's own backward
overwrites: a layer that was not used since the last step would be stepped with its last gradient once more. The
engine clears them, for the whole model, once they have been consumed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from adalora_dist.io.errors import UserError
from adalora_dist.sharding.base import (
    Shrink,
    State,
    assemble,
    innermost,
    nonfinite_flag,
    num_missing,
)
from adalora_dist.sharding.optimizer_state import local_state, restore_state
from adalora_dist.sharding.spans import Span
from adalora_dist.sharding.zero_shrink import rebuild_smaller


class _Fragment(NamedTuple):
    """What a rank owns of one parameter: ``span`` of it lies at ``offset`` of its group's partition."""

    group: int
    offset: int
    span: Span
    process_group: dist.ProcessGroup

    @property
    def length(self) -> int:
        return self.span.stop - self.span.start


# Where the three kinds of ZeRO optimizer keep (masters, the model's parameters by group).
_STAGE_3 = ("fp32_partitioned_groups_flat", "fp16_groups")
_STAGE_1_OR_2 = ("single_partition_of_fp32_groups", "bit16_groups")
_STAGE_1_BF16 = ("fp32_groups_flat_partition", "bf16_groups")
_KINDS = (_STAGE_3, _STAGE_1_OR_2, _STAGE_1_BF16)


def _is_zero_optimizer(optimizer: Any) -> bool:
    return any(hasattr(optimizer, kind[0]) for kind in _KINDS)


def _zero_optimizer_around(optimizer: Any) -> Any | None:
    """The ZeRO optimizer in a chain of wrappers, or that is just stepping its end; None without ZeRO."""
    zero = None
    while hasattr(optimizer, "optimizer"):
        zero = optimizer if _is_zero_optimizer(optimizer) else zero
        optimizer = optimizer.optimizer
    if zero is None and isinstance(optimizer, torch.optim.Optimizer):
        zero = _running_zero_optimizer(optimizer)
    return zero


def _running_zero_optimizer(optimizer: torch.optim.Optimizer) -> Any | None:
    """The ZeRO optimizer that is just stepping ``optimizer``; None outside of its step or without ZeRO.

    Found among the callers, because nothing else leads there in stages 1 and 2: the torch optimizer does not know who
    wraps it, and parameters are linked to the wrapper only on ranks that own a piece of them. Only inside of a step
    does the search end there: further up, a look at a frame's variables keeps them, a loss with its graph among them.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if getattr(caller, "optimizer", None) is optimizer and _is_zero_optimizer(caller):
            return caller
        frame = frame.f_back
    return None


class ZeroEngine:
    """See :class:`adalora_dist.sharding.base.ShardEngine`.

    Args:
        params: adapter parameters, as the model holds them.
        optimizer: the innermost torch optimizer, which steps ZeRO's masters, inside of a step; else a wrapper.

    Raises:
        UserError: a ZeRO feature that moves parts of the step out of the optimizer's reach, or adapters of
            different process groups.
    """

    def __init__(self, params: Sequence[Any], optimizer: Any) -> None:
        zero: Any = _zero_optimizer_around(optimizer)
        _refuse_unsupported(params, zero)
        self._params = list(params)
        self._optimizer: torch.optim.Optimizer = innermost(optimizer)
        self._zero = zero
        self._kind = next(kind for kind in _KINDS if hasattr(zero, kind[0]))
        self._located = (
            _fragments_stage_3(zero) if self._kind == _STAGE_3 else _fragments_of_flat_groups(zero, self._kind)
        )
        if missing := sum(p not in self._located for p in params):
            raise UserError(
                f"{missing} of {len(params)} adapter parameters are not in the ZeRO optimizer: pass all trainable "
                "parameters to the optimizer"
            )
        self._fragments = [self._located[p] for p in params]
        self.shard_group: dist.ProcessGroup | None = self._fragments[0].process_group
        if any(f.process_group is not self.shard_group for f in self._fragments):
            raise UserError(
                "adapter parameters are partitioned over different process groups (expert parallelism): adapt modules "
                "outside of the experts only"
            )
        self.num_firings = 1 if self._kind == _STAGE_1_BF16 else len(self._masters)
        self._held: list[tuple[Any, torch.Tensor | None]] = []
        self._addresses: list[int] = []
        self._views: list[torch.Tensor] = []
        # Set once this engine takes part in steps; one that only reads and restores does not.
        self._hook: RemovableHandle | None = None

    @classmethod
    def claims(cls, params: Sequence[Any], optimizer: Any) -> bool:
        return num_missing(params, optimizer) > 0 and _zero_optimizer_around(optimizer) is not None

    @property
    def _masters(self) -> list[Any]:
        """This rank's flat partition of each group, as the torch optimizer steps it."""
        masters: list[Any] = getattr(self._zero, self._kind[0])
        return masters

    def _firing_masters(self) -> list[Any]:
        return [master for group in self._optimizer.param_groups for master in group["params"]]

    def spans(self) -> list[Span]:
        return [f.span for f in self._fragments]

    def values(self) -> list[torch.Tensor]:
        addresses = [master.data_ptr() for master in self._masters]
        if addresses != self._addresses:  # at first, and should DeepSpeed ever move its buffers
            self._addresses, self._views = addresses, [self._values_of(f) for f in self._fragments]
        return list(self._views)

    def _values_of(self, fragment: _Fragment) -> torch.Tensor:
        return self._cut(fragment)(self._masters[fragment.group])

    def gradients(self) -> list[torch.Tensor | None]:
        firing, masters = {id(master) for master in self._firing_masters()}, self._masters
        return [
            masters[f.group].grad.narrow(0, f.offset, f.length) if id(masters[f.group]) in firing else None
            for f in self._fragments
        ]

    def nonfinite(self) -> torch.Tensor:
        """ZeRO's own global norm says it for all ranks and groups; some of its modes then go on all the same.

        Without a norm (``compute_grad_norm: false``) the first firing looks at the gradients of every group: the
        masters' where they have been made, those still waiting in ``averaged_gradients`` otherwise.
        """
        if self._hook is None:
            self._hook = self._optimizer.register_step_post_hook(self._after_firing)
        norm = self._zero._global_grad_norm
        if norm is not None:
            return (~torch.isfinite(torch.as_tensor(norm, dtype=torch.float32))).float()
        gradients = [master.grad for master in self._masters if master.grad is not None]
        for waiting in self._zero.averaged_gradients.values():
            gradients += [g for g in waiting or () if g is not None]
        return nonfinite_flag(gradients)

    def skip_firing_if(self, flag: torch.Tensor) -> None:
        if not flag.item():
            return
        for master in self._firing_masters():
            self._held.append((master, master.grad))
            master.grad = None

    def _after_firing(self, *_: Any) -> None:
        """Clear gradient buffers that outlive the step; those taken away to skip the firing go back first."""
        for master, gradient in self._held:
            master.grad = gradient
        self._held.clear()
        firing = self._firing_masters()
        for master in firing:
            if master.grad is not None:
                master.grad.zero_()
        if self._kind == _STAGE_3 and any(master is self._masters[-1] for master in firing):
            self._zero.grad_partitions_flat_buffer.zero_()

    def write(self, indices: Sequence[int], values: Sequence[torch.Tensor]) -> None:
        torch._foreach_copy_([self._values_of(self._fragments[k]) for k in indices], list(values))
        torch._foreach_copy_([self._working_copy(k) for k in indices], list(values))

    def _working_copy(self, index: int) -> torch.Tensor:
        p, fragment = self._params[index], self._fragments[index]
        if self._kind == _STAGE_3:
            held: torch.Tensor = p.ds_tensor.detach().narrow(0, 0, fragment.length)
        else:
            held = p.detach().view(-1)[fragment.span.start : fragment.span.stop]
        return held

    def shapes(self) -> list[torch.Size]:
        return [p.ds_shape if self._kind == _STAGE_3 else p.shape for p in self._params]

    def states(self) -> list[State]:
        return [
            local_state(self._optimizer.state.get(self._masters[f.group], {}), self._masters[f.group], self._cut(f))
            for f in self._fragments
        ]

    def restore(self, values: Sequence[torch.Tensor], states: Sequence[State]) -> None:
        counters: dict[int, set[float]] = {}
        for f, state in zip(self._fragments, states, strict=True):
            counters.setdefault(f.group, set()).update({float(state["step"])} if "step" in state else ())
        for group, steps in counters.items():
            if len(steps) > 1:
                raise UserError(
                    f"the parameters of a ZeRO group made different numbers of steps ({sorted(steps)}), and ZeRO "
                    "counts them together: continue on one process, with DDP or with FSDP2"
                )
            self._optimizer.state.pop(self._masters[group], None)
        self.write(range(len(values)), values)
        for f, state in zip(self._fragments, states, strict=True):
            if state:
                restore_state(self._optimizer, self._masters[f.group], self._cut(f), state)
        self._publish()

    @staticmethod
    def _cut(fragment: _Fragment) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda flat: flat.detach().narrow(0, fragment.offset, fragment.length)

    def _publish(self) -> None:
        """Working copies as ZeRO leaves them after a step: whole where it keeps them whole. Collective."""
        if self._kind != _STAGE_3:
            self._zero.update_lp_params()
        elif kept := self._zero.persistent_parameters:
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def neighbours(self) -> list[torch.Tensor]:
        """All else that is trained: it lies in the same flat buffers."""
        held = set(self._params)
        return [p for p in self._located if p not in held]

    def shrink(self, model: Any, optimizer: Any, shrinks: Sequence[Shrink]) -> None:
        """The DeepSpeed engine stays the same object, its ZeRO optimizer becomes another."""
        if getattr(model, "optimizer", None) is not self._zero:
            raise UserError(
                f"model is {type(model).__name__}: pass the DeepSpeed engine that steps the ZeRO optimizer, not the "
                "module inside"
            )
        rebuild_smaller(model, getattr(self._zero, self._kind[1]), self._kind == _STAGE_3, shrinks)
        while hasattr(optimizer, "optimizer"):
            if optimizer.optimizer is self._zero:
                optimizer.optimizer = model.optimizer
            optimizer = optimizer.optimizer

    def retire(self) -> None:
        if self._hook is not None:
            self._hook.remove()

    def full(self, index: int) -> torch.Tensor:
        fragment = self._fragments[index]
        return assemble(self._values_of(fragment), fragment.span, self.shapes()[index], self.shard_group)


def _fragments_of_flat_groups(zero: Any, kind: tuple[str, str]) -> dict[torch.Tensor, _Fragment]:
    """A model parameter is a view of its group's flat buffer: its address there says what this rank owns of it.

    (DeepSpeed's own ``_hp_mapping`` is not used: it assumes the order in which parameters were passed, which
    ``round_robin_gradients`` changes.)
    """
    fragments = {}
    masters, groups, flats = getattr(zero, kind[0]), getattr(zero, kind[1]), getattr(zero, f"{kind[1]}_flat")
    for group, params in enumerate(groups):
        flat, process_group, size = flats[group], zero.real_dp_process_group[group], masters[group].numel()
        partition_start = dist.get_rank(process_group) * size
        for p in params:
            first = (p.data_ptr() - flat.data_ptr()) // p.element_size()
            start = min(max(partition_start - first, 0), p.numel())
            stop = min(max(partition_start + size - first, 0), p.numel())
            offset = first + start - partition_start if stop > start else 0
            fragments[p] = _Fragment(group, offset, Span(start, stop), process_group)
    return fragments


def _fragments_stage_3(zero: Any) -> dict[torch.Tensor, _Fragment]:
    """Chunks of a sub-group's parameters lie one after the other, each with its padding."""
    fragments = {}
    for group, params in enumerate(zero.fp16_groups):
        offset = 0
        for p in params:
            chunk, process_group = p.ds_tensor.ds_numel, p.ds_process_group
            start = min(dist.get_rank(process_group) * chunk, p.ds_numel)
            fragments[p] = _Fragment(group, offset, Span(start, min(start + chunk, p.ds_numel)), process_group)
            offset += chunk
    return fragments


def _refuse_unsupported(params: Sequence[torch.Tensor], zero: Any) -> None:
    """What cannot work, by name: masters out of reach, steps past the hooked optimizer, or other gradients."""
    if getattr(zero, "swap_optimizer", False) or getattr(zero, "params_in_nvme_and_cpu", False):
        raise UserError('offload_optimizer/offload_param "device": "nvme" is not supported: use "cpu" or "none"')
    if getattr(zero, "zero_hpz_partition_size", 1) > 1:
        raise UserError(
            "zero_hpz_partition_size keeps a second copy of the weights, to which nothing is written when triplets are "
            "pruned: remove it"
        )
    if getattr(getattr(zero, "parameter_offload", None), "zero_quantized_weights", False):
        raise UserError("zero_quantized_weights rounds what ranks are allocated by: set it to false")
    if getattr(zero, "zenflow", False):
        raise UserError("zero_optimization.zenflow steps weights outside of the optimizer: remove the section")
    if hasattr(zero, "superoffload_cpu_optimizer"):
        raise UserError("offload_optimizer.super_offload steps weights in another process: set it to false")
    if getattr(zero, "offload_optimizer", False) and zero.partial_offload != 1.0:
        raise UserError(
            f"offload_optimizer.ratio is {zero.partial_offload}; only 1.0 is supported, because DeepSpeed steps the "
            "rest with an optimizer of its own: set it to 1.0"
        )
    if getattr(zero, "torch_autocast_gradscaler", None) is not None:
        raise UserError(
            "torch_autocast with float16 skips parameter groups one by one: use the fp16 or bf16 section instead"
        )
    if isinstance(innermost(zero), torch.optim.Adagrad) and not hasattr(zero, _STAGE_1_BF16[0]):
        raise UserError(
            "DeepSpeed steps an Adagrad that it makes in the place of yours, which no schedule of the learning rate "
            "and no option of a parameter group reaches: use RMSprop or AdamW"
        )
    if any(getattr(p, "use_muon", False) for p in params):
        raise UserError("ZeRO replaces the gradients of Muon's parameters by updates: use another optimizer (AdamW)")
