"""The machines that a plan is for, in words of the command line: ``--gpus 8x80GB --nodes 4 --engine fsdp2``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from adalora_dist.config.engines import ENGINES, copies_of_hsdp
from adalora_dist.io.errors import UserError
from adalora_dist.training.asked_for import check_asked_for, copies_asked_for, engine_asked_for

CHOICES = (*ENGINES, "hsdp")
"""FSDP2 with copies is what ``engine`` fsdp2 and ``copies`` say."""
_UNITS = {"g": 1.0, "gb": 1.0, "tb": 1e3, "gib": 2**30 / 1e9, "mib": 2**20 / 1e9}
"""Of memory, in 10^9 bytes."""
GIGABYTES = 80.0
"""Of a GPU that nobody has said anything of."""
USABLE = 0.92
"""Of a GPU's memory: the rest goes to CUDA's context, the communication library and what the allocator cannot use."""
FLOPS = 400e12
"""Operations per second of a GPU in 16 bits, sustained: 40 % of what an H100's data sheet has without sparsity."""
LINK_IN_NODE = 200e9
LINK_BETWEEN_NODES = 25e9
"""Bytes per second that a GPU sends, sustained, within a machine (NVLink) and between machines (200 Gbit/s)."""


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs in equal machines, one process on each GPU."""

    gpus_per_node: int
    gigabytes: float
    """Of a GPU's memory, in 10^9 bytes, as data sheets have it."""
    nodes: int = 1
    engine: str = "single"
    flops: float = FLOPS
    link: float | None = None
    """Bytes per second; None: by whether weights are gathered over more than one machine."""
    copies: int = 1
    """Of the weights that FSDP2 shards: more than one is HSDP."""

    @classmethod
    def parse(cls, gpus: str, nodes: int = 1, engine: str | None = None, **rates: float | None) -> Cluster:
        """
        Args:
            gpus: of one machine, such as 8x80GB, or 80GB for one; in GB of 10^9 bytes, TB, GiB or MiB.
            engine: of ``config.engines.ENGINES``, or hsdp; default: single for one GPU, else fsdp2.
            rates: flops and link, where others than the defaults.

        Raises:
            UserError: it is not understood, or engine and number of GPUs do not go together.
        """
        match = re.fullmatch(r"(?:(\d+)\s*[x*×])?\s*(\d+(?:\.\d+)?)\s*([a-z]*)", gpus.strip().lower())
        count = int(match[1] or 1) if match else 0
        # A number alone can be one of GPUs as well.
        unit = _UNITS.get(match[3] or ("gb" if match[1] else "?")) if match else None
        if match is None or unit is None or not 1 <= count <= 4096 or not 0 < float(match[2]) * unit <= 10_000:
            raise UserError(f"--gpus {gpus!r}: must be NUMBERxMEMORY of one machine, such as 8x80GB or 1x24GB")
        if not 1 <= nodes <= 100_000:
            raise UserError(f"--nodes {nodes}: must be from 1 to 100,000")
        world = count * nodes
        engine = engine or ("single" if world == 1 else "fsdp2")
        if engine not in CHOICES:
            raise UserError(f"--engine {engine}: must be one of {', '.join(CHOICES)}")
        if engine == "single" and world > 1:
            raise UserError(
                f"--engine single with {world} GPUs: one process uses one; give --gpus 1x80GB, or ddp or fsdp2"
            )
        copies = copies_of_hsdp(count, nodes) if engine == "hsdp" else 1
        engine, given = engine.replace("hsdp", "fsdp2"), {k: v for k, v in rates.items() if v is not None}
        return cls(count, float(match[2]) * unit, nodes, engine, copies=copies, **given)

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Cluster:
        """What the launcher of this process has asked for: its engine, its processes, this machine's GPU.

        Raises:
            UserError: DeepSpeed's configuration is none, or the launcher asks for what the run itself would refuse.
        """
        import torch  # the command's options stand above, and cost none

        check_asked_for(environment)
        num_processes = int(environment.get("WORLD_SIZE", 1))
        on_each = int(environment.get("LOCAL_WORLD_SIZE", num_processes))
        is_there = torch.cuda.is_available()
        gigabytes = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if is_there else GIGABYTES
        engine, copies = engine_asked_for(environment), copies_asked_for(environment)
        return cls(on_each, gigabytes, num_processes // on_each, engine, copies=copies)

    @property
    def world_size(self) -> int:
        return self.gpus_per_node * self.nodes

    @property
    def num_shards(self) -> int:
        """Processes that hold one copy of what is sharded."""
        return self.world_size // self.copies

    @property
    def link_rate(self) -> float:
        """Where each machine has a copy of the weights, only the gradients of what is trained leave it."""
        return self.link or (LINK_IN_NODE if self.num_shards <= self.gpus_per_node else LINK_BETWEEN_NODES)

    @property
    def engine_said(self) -> str:
        return f"hsdp ({self.copies} copies)" if self.copies > 1 else self.engine

    def said(self) -> str:
        machines = f"{self.nodes} machines with " if self.nodes > 1 else ""
        return f"{self.engine_said} on {machines}{self.gpus_per_node} x {self.gigabytes:g} GB"


PLANNED: ContextVar[Cluster | None] = ContextVar("PLANNED", default=None)
"""What ``adalora-dist plan`` asks a recipe's dry run to plan for."""
