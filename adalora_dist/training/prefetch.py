"""``--fsdp-prefetch``: FSDP2's blocks ask for the weights of several others ahead, so that these travel meanwhile.

By itself torch asks for one block: in the forward when the one before it has been started, in the backward when the
one behind it has. What is computed is the same to the last bit; every block ahead is memory for its whole weights.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from adalora_dist.io.errors import UserError
from adalora_dist.training.compiled import blocks_of


def prefetch_blocks(model: nn.Module, count: int) -> None:
    """Let each transformer block have the next ``count`` gathered in the forward, and those before it in the backward.

    Args:
        model: under FSDP2.

    Raises:
        UserError: it does not say what its blocks are.
    """
    blocks: list[Any] = [block for block in blocks_of(model) if hasattr(block, "set_modules_to_forward_prefetch")]
    if not blocks:
        raise UserError(
            f"fsdp_prefetch {count}: {type(model).__name__.removeprefix('FSDP')} does not say what its blocks are; set "
            "fsdp_prefetch to 0"
        )
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + count])
        block.set_modules_to_backward_prefetch(blocks[max(0, index - count) : index][::-1])
