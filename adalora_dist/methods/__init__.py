"""Methods: what is trained. One file each; this table is all that knows which there are."""

from __future__ import annotations

from adalora_dist.config.methods import MethodConfig
from adalora_dist.methods.adadora import AdaDora
from adalora_dist.methods.adalora.method import AdaLora
from adalora_dist.methods.bitfit import BitFit
from adalora_dist.methods.bottleneck import AdapterDrop, Houlsby, Parallel, Pfeiffer, Series
from adalora_dist.methods.dora import Dora
from adalora_dist.methods.dvora import Dvora
from adalora_dist.methods.dylora import Dylora
from adalora_dist.methods.full import Full
from adalora_dist.methods.galore.method import GaLore
from adalora_dist.methods.head import Head
from adalora_dist.methods.hydra import Hydra
from adalora_dist.methods.lora import Lora
from adalora_dist.methods.lora_fa import LoraFa
from adalora_dist.methods.low_rank import LowRank
from adalora_dist.methods.prefix import PrefixTuning
from adalora_dist.methods.protocol import Method
from adalora_dist.methods.relora import Relora
from adalora_dist.methods.vera import Vera

METHODS: dict[str, type[Method]] = {
    "adalora": AdaLora,
    "lora": Lora,
    "lora_fa": LoraFa,
    "dora": Dora,
    "adadora": AdaDora,
    "vera": Vera,
    "dvora": Dvora,
    "hydra": Hydra,
    "dylora": Dylora,
    "relora": Relora,
    "houlsby": Houlsby,
    "pfeiffer": Pfeiffer,
    "adapterdrop": AdapterDrop,
    "series": Series,
    "parallel": Parallel,
    "prefix": PrefixTuning,
    "low_rank": LowRank,
    "galore": GaLore,
    "bitfit": BitFit,
    "head": Head,
    "full": Full,
}
"""By the word that ``--method`` takes."""


def method_for(config: MethodConfig) -> Method:
    """The method that the ``adapter`` section asks for, with its settings."""
    return METHODS[config.method](config)
