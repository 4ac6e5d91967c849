"""The training engines by name, as logs, run folders, tables and messages have them.

What is true of an engine as a whole stands here; what it does to parameters, in ``sharding``.
"""

from __future__ import annotations

ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")

BACKBONE_SHARDING = ("fsdp2", "zero3")
"""Those under which a process holds only its share of the frozen weights, so that every forward is collective."""
