"""What ``merge_to_generate`` can be set with. Never imports torch."""

from __future__ import annotations

from typing import Any

from adalora_dist.config.engines import BACKBONE_SHARDING
from adalora_dist.io.errors import UserError


def check_merging(run: Any) -> None:
    """Rules over settings of several sections.

    Args:
        run: the ``RunConfig``.

    Raises:
        ValueError: one line with the settings, the rule and the remedy.
    """
    if not is_asked_for(run.evaluation):
        return
    if not run.adapter.merges:
        raise ValueError(
            f"merge_to_generate true with method {run.adapter.method}: adapters of adalora and lora are added to their "
            "weights, and no others; leave merge_to_generate out, or set method to adalora"
        )
    if (quantization := run.quantization.quantization) != "none":
        raise ValueError(
            f"merge_to_generate true with quantization {quantization}: nothing can be added to quantised weights; "
            "leave merge_to_generate out, or set quantization to none"
        )


def check_merging_engine(evaluation: Any, engine: str) -> None:
    """Raise where no process has the weights that adapters are to be added to.

    Args:
        evaluation: the section.

    Raises:
        UserError: the engine shards them.
    """
    if is_asked_for(evaluation) and engine in BACKBONE_SHARDING:
        raise UserError(
            f"merge_to_generate true under {engine}: a process has only its share of the weights that adapters would "
            "be added to; leave merge_to_generate out, or launch with DDP or ZeRO-2"
        )


def is_asked_for(evaluation: Any) -> bool:
    """Of any recipe, those that generate nothing among them."""
    return bool(getattr(evaluation, "merge_to_generate", False))
