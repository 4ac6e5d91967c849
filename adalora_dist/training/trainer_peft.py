"""What a ``Trainer`` was made with for PEFT's adapters, as TRL's are with ``peft_config``: converted, or refused."""

from __future__ import annotations

import inspect
from typing import Any

from adalora_dist.artifacts.peft_model import convert_peft
from adalora_dist.config.methods import LowRankConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adapter import without_adapters

_RAW_PARAMETERS = {"use_vllm": "vLLM would be sent", "sync_ref_model": "the reference model would be mixed with"}
"""Settings of TRL's by which a model's parameters go elsewhere under their names, and where."""


def convert_model(trainer: Any, config: LowRankConfig | None, settings: dict[str, Any]) -> LowRankConfig:
    """Give ``trainer``, which has not trained, the model of transformers' in the place of PEFT's.

    Args:
        config, settings: as of :func:`adalora_dist.artifacts.peft_model.convert_peft`.

    Raises:
        UserError: as that; an optimizer has taken PEFT's parameters over.
    """
    if trainer.optimizer is not None:
        raise UserError(
            "optimizers=(...) was made for PEFT's parameters, which are converted: leave it out of the Trainer, or "
            "call convert_peft before the optimizer is made"
        )
    model, config = convert_peft(trainer.model, config, **settings)
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model
    return config


def refuse_raw_parameters(args: Any) -> None:
    """Refuse what sends a model's parameters elsewhere.

    Raises:
        UserError: naming the setting.
    """
    for setting, sent in _RAW_PARAMETERS.items():
        if getattr(args, setting, False):
            raise UserError(
                f"{setting}=True: {sent} the parameters of adapters, which it does not know: set it to False"
            )


def asks_peft_for_its_reference(trainer: Any) -> bool:
    """Whether the constructor of ``trainer`` goes on to look for PEFT's adapters, once Trainer's own has returned.

    TRL's DPO and KTO do: where they find some, they load no reference model. So their model is converted when training
    begins, and until then it is PEFT's.
    """
    made_by = [vars(kind)["__init__"] for kind in type(trainer).__mro__[:-1] if "__init__" in vars(kind)]
    return any("ref_model" in inspect.signature(made).parameters for made in made_by)


class WithoutAdapters:
    """Stands where TRL has a reference model: the trained one, called without its adapters.

    TRL's trainers load none where PEFT's adapters can be switched off, and ask PEFT to do so.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        with without_adapters(self._trainer.model):
            return self._trainer.model(*args, **inputs)

    @classmethod
    def give(cls, trainer: Any) -> None:
        """Let a Trainer that relies on PEFT for its reference have one."""
        if getattr(trainer, "ref_model", trainer) is None and getattr(trainer, "beta", 0) != 0:
            trainer.ref_model = cls(trainer)
