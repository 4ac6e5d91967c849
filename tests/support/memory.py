"""What PyTorch's CPU allocator gives out while a function runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(action: Callable[[], Any], files: Iterable[Path] = ()) -> int:
    """Most bytes that were allocated and not yet freed at any time in ``action``, beyond those before it.

    Args:
        files: which it maps. The allocator reports a mapping in the size of its file, though it holds no page of it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    mapped = {file.stat().st_size for file in files}
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.device_type() == torch.autograd.DeviceType.CPU and abs(event.nbytes()) not in mapped:
            held += event.nbytes()
            peak = max(peak, held)
    return peak
