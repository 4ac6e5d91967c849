"""Adaptive-rank fine-tuning (AdaLoRA) with sharded models: the names that are kept stable, see docs/api.md.

Each is imported when it is first asked for, so that configurations never import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adalora_dist.artifacts.adapted_model import adapt as adapt
    from adalora_dist.artifacts.export import load_adapter as load_adapter
    from adalora_dist.artifacts.hub.push import push as push
    from adalora_dist.artifacts.peft_model import convert_peft as convert_peft
    from adalora_dist.artifacts.verbs import merge as merge
    from adalora_dist.artifacts.verbs import save_adalora as save_adalora
    from adalora_dist.artifacts.verbs import save_adapter as save_adapter
    from adalora_dist.artifacts.verbs import save_lora as save_lora
    from adalora_dist.config.methods import AdaLoraConfig as AdaLoraConfig
    from adalora_dist.config.methods import FullConfig as FullConfig
    from adalora_dist.config.methods import HeadConfig as HeadConfig
    from adalora_dist.config.methods import LoraConfig as LoraConfig
    from adalora_dist.config.methods import method_config as method_config
    from adalora_dist.io.errors import UserError as UserError
    from adalora_dist.methods.adapter import without_adapters as without_adapters
    from adalora_dist.methods.hooks import MethodHooks as MethodHooks
    from adalora_dist.methods.hooks import attach as attach
    from adalora_dist.methods.inject import parameter_groups as parameter_groups
    from adalora_dist.methods.packing import pack_adapters as pack_adapters
    from adalora_dist.methods.parameter_budget import within_budget as within_budget
    from adalora_dist.training.trainer_callback import AdaLoraCallback as AdaLoraCallback

_HOMES = {
    "AdaLoraConfig": "config.methods",
    "LoraConfig": "config.methods",
    "HeadConfig": "config.methods",
    "FullConfig": "config.methods",
    "method_config": "config.methods",
    "UserError": "io.errors",
    "within_budget": "methods.parameter_budget",
    "adapt": "artifacts.adapted_model",
    "parameter_groups": "methods.inject",
    "pack_adapters": "methods.packing",
    "without_adapters": "methods.adapter",
    "convert_peft": "artifacts.peft_model",
    "attach": "methods.hooks",
    "MethodHooks": "methods.hooks",
    "AdaLoraCallback": "training.trainer_callback",
    "save_adapter": "artifacts.verbs",
    "load_adapter": "artifacts.export",
    "merge": "artifacts.verbs",
    "save_lora": "artifacts.verbs",
    "save_adalora": "artifacts.verbs",
    "push": "artifacts.hub.push",
}
__all__ = list(_HOMES)  # noqa: PLE0605 (checked against the imports above by tests/test_api.py)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: it has {', '.join(sorted(_HOMES))}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
