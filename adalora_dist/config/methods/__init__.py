"""What is trained: one section of settings per method, of which a run has one.

A new method's settings are a class in a file of this folder, and a line of ``METHODS``. Settings that several methods
have go by one name and mean one thing. Docstrings under fields are the texts of ``--help``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationError

from adalora_dist.config.methods.adalora import AdaLoraConfig
from adalora_dist.config.methods.base import METHODS, LowRankConfig, MethodConfig, methods_with
from adalora_dist.config.methods.full import FullConfig
from adalora_dist.config.methods.head import HeadConfig
from adalora_dist.config.methods.lora import LoraConfig

METHODS.update(
    adalora=AdaLoraConfig,
    lora=LoraConfig,
    head=HeadConfig,
    full=FullConfig,
)

DEFAULT_METHOD = "adalora"


def method_config(method: str = DEFAULT_METHOD, **settings: Any) -> MethodConfig:
    """The settings of a method by its name.

    Raises:
        ValidationError: no such method, a setting that it lacks, or a value that is not legal.
    """
    if method not in METHODS:
        expected = {"expected": ", ".join(METHODS)}
        details = {"type": "literal_error", "loc": ("method",), "input": method, "ctx": expected}
        raise ValidationError.from_exception_data("MethodConfig", [details])  # type: ignore[list-item]
    return METHODS[method].model_validate(settings)


def settings_of(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of settings that were made for several methods, those that ``method`` has; what none has stays, to be refused."""
    own = METHODS[method].model_fields
    return {name: value for name, value in settings.items() if name in own or not methods_with(name)}


def _of_its_method(section: Any) -> Any:
    return method_config(**section) if isinstance(section, Mapping) else section


AnyMethodConfig = Annotated[SerializeAsAny[MethodConfig], BeforeValidator(_of_its_method)]
"""Type of the ``adapter`` section: a mapping becomes, and is written as, the section of the method that it names."""

__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "AdaLoraConfig",
    "AnyMethodConfig",
    "FullConfig",
    "HeadConfig",
    "LoraConfig",
    "LowRankConfig",
    "MethodConfig",
    "method_config",
    "settings_of",
]
