"""What is trained: one section of settings per method, of which a run has one.

A new method's settings are a class in a file of this folder, and a line of ``METHODS``. Settings that several methods
have go by one name and mean one thing. Docstrings under fields are the texts of ``--help``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationError
from pydantic_core import InitErrorDetails

from adalora_dist.config.methods.adadora import AdaDoraConfig
from adalora_dist.config.methods.adalora import AdaLoraConfig, AdaptiveConfig
from adalora_dist.config.methods.base import (
    METHODS,
    LowRankConfig,
    MethodConfig,
    SizedConfig,
    TargetsConfig,
    TripletConfig,
    methods_with,
)
from adalora_dist.config.methods.bitfit import BitFitConfig
from adalora_dist.config.methods.bottleneck import (
    AdapterDropConfig,
    BottleneckConfig,
    HoulsbyConfig,
    ParallelConfig,
    PfeifferConfig,
    SeriesConfig,
)
from adalora_dist.config.methods.dora import DoraConfig
from adalora_dist.config.methods.dylora import DyloraConfig
from adalora_dist.config.methods.full import FullConfig
from adalora_dist.config.methods.galore import GaLoreConfig
from adalora_dist.config.methods.head import HeadConfig
from adalora_dist.config.methods.hydra import HydraConfig
from adalora_dist.config.methods.lora import LoraConfig
from adalora_dist.config.methods.lora_fa import LoraFaConfig
from adalora_dist.config.methods.low_rank import FactorisedConfig
from adalora_dist.config.methods.prefix import PrefixConfig
from adalora_dist.config.methods.relora import ReloraConfig
from adalora_dist.config.methods.vera import DvoraConfig, VeraConfig
from adalora_dist.config.words import near
from adalora_dist.io.errors import UserError

METHODS.update(
    adalora=AdaLoraConfig,
    lora=LoraConfig,
    lora_fa=LoraFaConfig,
    dora=DoraConfig,
    adadora=AdaDoraConfig,
    vera=VeraConfig,
    dvora=DvoraConfig,
    hydra=HydraConfig,
    dylora=DyloraConfig,
    relora=ReloraConfig,
    houlsby=HoulsbyConfig,
    pfeiffer=PfeifferConfig,
    adapterdrop=AdapterDropConfig,
    series=SeriesConfig,
    parallel=ParallelConfig,
    prefix=PrefixConfig,
    low_rank=FactorisedConfig,
    galore=GaLoreConfig,
    bitfit=BitFitConfig,
    head=HeadConfig,
    full=FullConfig,
)

DEFAULT_METHOD = "adalora"


def method_config(method: str = DEFAULT_METHOD, **settings: Any) -> MethodConfig:
    """The settings of a method by its name.

    Raises:
        UserError: no such method, a setting that it lacks, or a value that is not legal.
    """
    if not is_method(method):
        hint = "".join(f"; did you mean {alike}?" for alike in near(str(method), list(METHODS))[:1])
        raise UserError(f"method={method!r}: must be one of {', '.join(METHODS)}{hint}")
    return METHODS[method](**settings)


def is_method(name: object) -> bool:
    """Whether there is a method of this name; anything may be asked, as it stood in a file."""
    return isinstance(name, str) and name in METHODS


def settings_of(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of settings that were made for several methods, those that ``method`` has; what none has stays, to be refused."""
    own = METHODS[method].model_fields
    return {name: value for name, value in settings.items() if name in own or not methods_with(name)}


def _of_its_method(section: Any) -> Any:
    if not isinstance(section, Mapping):
        return section
    method = section.get("method", DEFAULT_METHOD)
    if not is_method(method):
        expected = {"expected": ", ".join(METHODS)}
        details = InitErrorDetails(type="literal_error", loc=("method",), input=method, ctx=expected)
        raise ValidationError.from_exception_data("MethodConfig", [details])
    return METHODS[method].model_validate(dict(section))


AnyMethodConfig = Annotated[SerializeAsAny[MethodConfig], BeforeValidator(_of_its_method)]
"""Type of the ``adapter`` section: a mapping becomes, and is written as, the section of the method that it names."""

__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "AdaDoraConfig",
    "AdaLoraConfig",
    "AdapterDropConfig",
    "AdaptiveConfig",
    "AnyMethodConfig",
    "BitFitConfig",
    "BottleneckConfig",
    "DoraConfig",
    "DvoraConfig",
    "DyloraConfig",
    "FactorisedConfig",
    "FullConfig",
    "GaLoreConfig",
    "HeadConfig",
    "HoulsbyConfig",
    "HydraConfig",
    "LoraConfig",
    "LoraFaConfig",
    "LowRankConfig",
    "MethodConfig",
    "ParallelConfig",
    "PfeifferConfig",
    "PrefixConfig",
    "ReloraConfig",
    "SeriesConfig",
    "SizedConfig",
    "TargetsConfig",
    "TripletConfig",
    "VeraConfig",
    "is_method",
    "method_config",
    "settings_of",
]
