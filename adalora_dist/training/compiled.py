"""``--compile``: transformer blocks, forward and backward, by torch.compile, block by block.

A block is compiled as one graph, or refused. Blocks of a kind share what was compiled once, so nothing in it may differ
from block to block but tensors; which part of lambda a layer has would. P diag(lambda), or lambda's part where P are
sharded, is therefore made outside, for all layers at once and as ever, and given to a block when it is called.

Numbers of rows and of positions are symbols in the graph. Ranks are sizes of parameters, so that every block is built
anew when pruned triplets leave memory, once in a run.

What runs compiled is a matter of the step's number and of nothing else, so that a run that is continued computes what
the whole run would have. The first step of a run is not: in it hooks watch whether every adapter takes part. Evaluation
and generation, whose caches change with every token, run as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from adalora_dist.backbones.parts import outermost
from adalora_dist.io.build_tools import missing_build_tool
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.experts import ExpertTriplets
from adalora_dist.methods.adalora.layers import TripletLayer
from adalora_dist.methods.hooks import MethodHooks

VARIANTS = 8
"""How often each block may be compiled in a run: with ranks before and after the freeze, one row or several, an input
that needs a gradient or does not; torch gives up at so many of all blocks together."""


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model, by transformers' own mark of them; without those that lie in others."""
    return outermost(model, lambda module: isinstance(module, GradientCheckpointingLayer))


def compile_blocks(model: nn.Module, hooks: MethodHooks, backend: str | Callable[..., Any] = "inductor") -> int:
    """Let the blocks of ``model`` train compiled from the second step of the run on. Names of parameters stay.

    Args:
        model: under its engine; not under DeepSpeed, which gathers weights within a block.
        hooks: what counts the steps.

    Returns:
        The number of blocks.

    Raises:
        UserError: there are none, experts are adapted, or what the backend needs to build blocks is not there.
    """
    if stack := next((module for module in model.modules() if isinstance(module, ExpertTriplets)), None):
        raise UserError(
            f"compile true: {stack.name} are experts with adapters, whose widths follow from their ranks; set compile "
            "to false, or leave experts out of targets"
        )
    blocks = blocks_of(model)
    if not blocks:
        raise UserError(f"compile true: {type(model).__name__} does not say what its blocks are; set compile to false")
    if backend == "inductor" and (missing := missing_build_tool(torch.cuda.is_available())):
        raise UserError(f"compile true: torch.compile needs {missing}; install it, or set compile to false")
    if hooks.step:
        hooks.watch_no_longer()
    for block in blocks:
        block._compiled_call_impl = _CompiledCall(block, hooks, backend, len(blocks))
    return len(blocks)


class _CompiledCall:
    """In the place of a block's call; left behind when the block is copied, as what torch puts there is."""

    def __init__(self, block: nn.Module, hooks: MethodHooks, backend: str | Callable[..., Any], num: int) -> None:
        self._block, self._hooks = block, hooks
        self._layers = [module for module in block.modules() if isinstance(module, TripletLayer)]
        self._compiled = torch.compile(block._call_impl, backend=backend, fullgraph=True, dynamic=True)
        limit = VARIANTS * num
        self._settings = {"recompile_limit": limit, "accumulated_recompile_limit": limit, "optimize_ddp": False}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        block = self._block
        if self._hooks.step == 0 or not (block.training and torch.is_grad_enabled()):
            return block._call_impl(*arguments, **named)
        for layer in self._layers:
            if layer.rank:
                layer.given = layer.lambdas.part(layer)
        try:
            with torch._dynamo.config.patch(self._settings):
                return self._compiled(*arguments, **named)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"compile true: {type(block).__name__} cannot be compiled as one graph ({reason}): set compile to false"
            ) from error
        finally:
            for layer in self._layers:
                layer.given = None
