"""Steps whose loss or gradients are nan or inf: how many in a row, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from adalora_dist.methods.protocol import TrainedModule
from adalora_dist.sharding.packing import packs_of
from adalora_dist.sharding.tensors import local_elements
from adalora_dist.tasks.losses import LossSum


class BadSteps:
    """Counts steps in a row that taught nothing, from what the loop reads at its log lines: no further synchronisation.

    A step is bad if its loss is not finite, or if the allocator left it out; which ones of a few it left out is not
    known, so those count only if it was all of them.
    """

    def __init__(self, limit: int, num_skipped: int = 0) -> None:
        self.limit, self.in_a_row = limit, 0
        self._num_skipped = num_skipped

    def too_many(self, losses: Sequence[float], num_skipped: int) -> bool:
        """Whether the limit is reached, given the losses since the last call and all steps left out so far."""
        all_left_out = num_skipped - self._num_skipped >= len(losses)
        self._num_skipped = num_skipped
        for loss in losses:
            self.in_a_row = 0 if math.isfinite(loss) and not all_left_out else self.in_a_row + 1
            if self.in_a_row >= self.limit:
                return True
        return False


def find_origin(
    accelerator: Accelerator, model: nn.Module, loss_sum: LossSum, micro_batches: Sequence[list[int]]
) -> str:
    """Run a step's forwards and backwards again; in words, where the first nan or inf arises, and on which rank.

    Looks, in this order, at the weights, at every module's output, and at the gradient of every trained parameter
    before any engine has added up those of other ranks, which would carry it everywhere. Collective; slow; the
    gradients it leaves are of no use.
    """
    finding = _bad_weight(model)
    watched = _Watched()
    hooks = [h for name, module in model.named_modules() for h in watched.hooks(_plain(name), module)]
    try:
        for indices in micro_batches:
            loss = loss_sum(model, indices)
            if not torch.isfinite(loss):
                watched.note(1, f"the loss is {loss.item()}")
            accelerator.backward(loss)
    finally:
        for hook in hooks:
            hook.remove()
    found = [*([(0, finding)] if finding else []), *watched.findings]
    of_ranks: list[Any] = gather_object([(*min(found, key=lambda f: f[0]), accelerator.process_index)] if found else [])
    if not of_ranks:
        return "run again the step was finite: look for a machine with faulty memory, or for randomness in the model"
    _, text, rank = min(of_ranks, key=lambda f: (f[0], f[2]))
    return f"first on rank {rank}: {text}"


class _Watched:
    def __init__(self) -> None:
        self.findings: list[tuple[int, str]] = []

    def note(self, order: int, text: str) -> None:
        """Keep the first finding of each kind."""
        if not any(o == order for o, _ in self.findings):
            self.findings.append((order, text))

    def hooks(self, name: str, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(partial(self._before, name)),
            module.register_forward_hook(partial(self._after, name)),
        ]

    def _before(self, name: str, module: nn.Module, args: Any) -> None:
        # Parameters are taken as they are now: some engines put others into the module for the time of its forward.
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and torch.is_grad_enabled():
                parameter.register_hook(partial(self._gradient, f"{name}.{leaf}", module))

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
            self.note(1, f"the output of {name}")

    def _gradient(self, name: str, module: nn.Module, gradient: torch.Tensor) -> None:
        finite = torch.isfinite(gradient)
        if not finite.all():
            first = int(finite.logical_not().flatten().nonzero()[0])
            self.note(2, f"the gradient of {_element_name(name, module, first)}")


def _element_name(name: str, module: nn.Module, index: int) -> str:
    """What a person calls element ``index`` of the flattened parameter ``name``, a leaf of ``module``."""
    leaf = name.rpartition(".")[2]
    if (pack := packs_of(module).get(leaf)) is not None:
        module, leaf, index = pack.element(index)
    return module.element_name(leaf, index) if isinstance(module, TrainedModule) else name


def _bad_weight(model: nn.Module) -> str | None:
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            local, span = local_elements(parameter)
            if local.is_floating_point() and not (finite := torch.isfinite(local)).all():
                name = f"{path}.{leaf}" if path else leaf
                if leaf in packs_of(module):
                    name = _element_name(name, module, span.start + int(finite.logical_not().nonzero()[0]))
                return f"the weight {_plain(name)}"
    return None


def _plain(name: str) -> str:
    """Without what DDP and DeepSpeed put before every name."""
    return name.removeprefix("module.")
