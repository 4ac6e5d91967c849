"""``save_pretrained`` of a model that has adapters: it writes the adapter, which PEFT loads, and nothing of the model.

transformers would write the adapters' parameters under names that ``from_pretrained`` does not know, and take the
adapted weights for missing ones: fresh random numbers, without an error. So the method is replaced on the model itself;
whoever asks it (``Trainer``, ``push_to_hub``) gets the adapter.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adalora_dist.artifacts.adapter_files import task_settings
from adalora_dist.artifacts.peft_check import not_verified
from adalora_dist.artifacts.peft_format import save_lora
from adalora_dist.backbones.names import plain_model
from adalora_dist.config.methods import MethodConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods import METHODS, inject
from adalora_dist.methods.protocol import Adapter, Method, TrainedModule, adapters_of, others_trained, plain_path
from adalora_dist.methods.update import AdapterWeights
from adalora_dist.sharding.tensors import is_whole, whole_tensor

_BUILT_IN = "_adapter"  # a name that uploads of Trainer's leave out
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapt(model: nn.Module, config: MethodConfig, seed: int = 0) -> list[Adapter]:
    """Put the adapters of ``config.method`` into ``model``; only they and ``train_modules`` stay trainable.

    From then on ``model.save_pretrained(folder)`` writes the adapter, for PEFT.

    Returns:
        The adapters in the order of ``model.named_modules()``; none with the methods head and full.

    Raises:
        UserError: as :func:`adalora_dist.methods.inject.adapt`.
    """
    adapters = inject.adapt(model, config, seed)
    save_as_adapter(model, METHODS[config.method])
    return adapters


def save_as_adapter(model: nn.Module, method: type[Method]) -> None:
    """Make ``model.save_pretrained`` write the adapter; nothing is done to models without one, or without the method.

    Args:
        model: not wrapped, as ``adapt`` left it.
        method: of its adapters.
    """
    if hasattr(model, "save_pretrained") and adapters_of(model):
        model.save_pretrained = SaveAdapter(model, method)  # type: ignore[assignment]


def trained_state(model: nn.Module, keep: bool = True) -> dict[str, torch.Tensor]:
    """Everything that is trained in ``model``, whole, on the CPU, by path. Collective where an engine shards it.

    Args:
        model: see :func:`adalora_dist.sharding.tensors.release_gathered` for what has to be done to it before.
        keep: false on processes that only take part; they get nothing, one tensor in memory at a time.
    """
    state = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            whole = whole_tensor(parameter)
            if keep:
                state[path] = whole.cpu()
    return state


class SaveAdapter:
    """What ``model.save_pretrained`` is, for a model that has adapters.

    The folder gets adapter_model.safetensors and adapter_config.json: plain LoRA of the function that the model
    computes now. Triplets whose lambda is 0 have no part in that and are left out, so that a pattern that is frozen
    gives the budget's triplets, and one that is not yet, all that are alive.
    """

    def __init__(self, model: nn.Module, method: type[Method]) -> None:
        self._model, self._method = model, method

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Write the adapter into ``save_directory``, in the place of one that is there.

        Args:
            is_main_process: the others write nothing.
            state_dict: whole tensors by path, for parameters that an engine shards; default: the model's own.
            options: of transformers' method; those about files of the whole model have no object here.

        Raises:
            UserError: the adapter cannot be written rightly: parameters are sharded and ``state_dict`` lacks them or is
                not given, adapters lie in a part that was adapted alone, or PEFT would load another function.
        """
        if not is_main_process:
            return
        for option in ("push_to_hub", "variant"):
            if options.get(option):
                raise UserError(
                    f"save_pretrained({option}={options[option]!r}) of a model with adapters is not supported: leave "
                    "it out; model.push_to_hub(repo_id) uploads the adapter"
                )
        model: Any = self._model
        if getattr(model, "config", None) is None or not hasattr(model.config, "to_dict"):
            raise UserError(
                f"{type(model).__name__} is no model of transformers', so PEFT could not load its adapter: adapt the "
                "transformers model inside of it"
            )
        self._refuse_other_places()
        values = _Values(model, state_dict)
        adapters = adapters_of(model)
        updates = self._method.updates(
            {adapter.name: adapter.description() for adapter in adapters},
            {adapter.name: adapter.held() for adapter in adapters},
            None,
            values.of_adapter,
        )
        trained = {plain_path(name): values.of(parameter) for name, parameter in others_trained(model)}
        _write(model, alive(updates), trained, Path(save_directory))

    def _refuse_other_places(self) -> None:
        for path, module in self._model.named_modules():
            if isinstance(module, Adapter):
                if plain_path(path) != module.name:
                    raise UserError(
                        f"the adapter of {module.name} lies at {path} of {type(self._model).__name__}, of which a "
                        "part was adapted: save that part"
                    )
                if any(not p.requires_grad for p in module.parameters(recurse=False)):
                    raise UserError(
                        f"adapter parameters of {module.name} have requires_grad=False, by which trained and fixed "
                        "factors are told apart: save the model before freezing it"
                    )


class _Values:
    """The values of a model's trained parameters: its own, or those of a state dictionary."""

    def __init__(self, model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None) -> None:
        self._given = None if state_dict is None else {plain_path(path): value for path, value in state_dict.items()}
        self._paths = {id(p): plain_path(path) for path, p in model.named_parameters()}
        owners = (module for module in model.modules() if isinstance(module, TrainedModule))
        self._by_name = {name: p for owner in owners for name, p in owner.trained().items()}

    def of_adapter(self, name: str) -> torch.Tensor | None:
        """By the name that files have; None where there is no such parameter."""
        return self.of(self._by_name[name]).float() if name in self._by_name else None

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        path = self._paths[id(parameter)]
        if self._given is None:
            if not is_whole(parameter):
                raise UserError(
                    f"{path} is sharded over processes: call trainer.save_model(folder) on every process instead of "
                    "model.save_pretrained"
                )
            return parameter.detach().cpu()
        if path not in self._given:
            raise UserError(f"state_dict lacks {path}, which is trained: pass the whole state, or none")
        return self._given[path].detach().cpu()


def alive(updates: Sequence[AdapterWeights]) -> list[AdapterWeights]:
    """The same function without the triplets whose lambda is 0; all of them where nothing else is left."""
    if not any(update.lam.any() for update in updates):
        return list(updates)
    cut = []
    for update in updates:
        kept = update.lam != 0
        cut.append(replace(update, P=update.P[:, kept], lam=update.lam[kept], Q=update.Q[kept]))
    return cut


def _write(model: Any, updates: list[AdapterWeights], trained: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Built and verified in a folder inside; what PEFT looks for first comes last, and goes first."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = plain_model(model.config, task_settings(model))
    built = folder / _BUILT_IN
    shutil.rmtree(built, ignore_errors=True)
    base = getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", "")
    revision = getattr(model.config, "_commit_hash", None)
    save_lora(updates, built, base or None, revision, trained=trained, model=plain)
    if said := not_verified(plain):
        warnings.warn(f"{folder}: {said}", stacklevel=4)
    (folder / _CONFIG).unlink(missing_ok=True)
    for name in (_WEIGHTS, _CONFIG):
        os.replace(built / name, folder / name)
    built.rmdir()
