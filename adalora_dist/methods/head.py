"""Nothing but ``train_modules`` is trained, a classifier for instance: the reference for what adapters add."""

from __future__ import annotations

from adalora_dist.methods.protocol import Method


class Head(Method):
    """No adapters."""
