"""Where the processes of a restarted attempt meet: not where those of the attempt before have left their addresses.

torchrun's agent, and with it accelerate's launcher, lets all attempts use one store. A group that is made in the second
finds under its keys the addresses of processes that are gone, and ends in "Connection refused". So each attempt has its
own part of the store; groups that are made later lie in that of the first one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

_SCHEME = "adalora-dist"
_COUNT = "TORCHELASTIC_RESTART_COUNT"


def init_method(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What ``init_process_group`` is to be given besides the backend; {} where torch's own way will do."""
    is_agents = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return {"init_method": f"{_SCHEME}://"} if is_agents and environment.get(_COUNT, "0") != "0" else {}


def _meet(url: str, **options: Any) -> Iterator[tuple[Store, int, int]]:
    for store, rank, world_size in rendezvous("env://", **options):
        yield PrefixStore(f"{_SCHEME}/attempt_{os.environ[_COUNT]}", store), rank, world_size


register_rendezvous_handler(_SCHEME, _meet)
