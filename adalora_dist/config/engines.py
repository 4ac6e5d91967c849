"""The training engines by name, as logs, run folders, tables and messages have them.

What is true of an engine as a whole stands here; what it does to parameters, in ``sharding``.
"""

from __future__ import annotations

from adalora_dist.io.errors import UserError

ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")

BACKBONE_SHARDING = ("fsdp2", "zero3")
"""Those under which a process holds only its share of the frozen weights, so that every forward is collective."""


def copies_of_hsdp(num_processes: int, num_nodes: int) -> int:
    """Of the weights under HSDP, FSDP2 with copies: one on each machine; on a single one two.

    Args:
        num_processes: on each machine.

    Raises:
        UserError: a copy would have one process, or copies would not have equally many.
    """
    copies = num_nodes if num_nodes > 1 else 2
    of_each, left = divmod(num_processes * num_nodes, copies)
    if left or of_each < 2:
        raise UserError(
            f"hsdp on {num_nodes} machine(s) with {num_processes} process(es): each machine has a copy of the weights, "
            "a single one two, and a copy is spread over 2 processes or more: take as many, or fsdp2 or ddp"
        )
    return copies


def check_prefetch_engine(num_blocks: int, is_fsdp: bool) -> None:
    """Raise where nothing gathers blocks, or another engine does in its own way.

    Raises:
        UserError: it is not FSDP2, or FSDP2 of one process.
    """
    if num_blocks and not is_fsdp:
        raise UserError(
            f"fsdp_prefetch {num_blocks}: only FSDP2 on two or more processes gathers blocks ahead; set fsdp_prefetch "
            "to 0, or launch with --config_file launch/accelerate/fsdp2.yaml"
        )
