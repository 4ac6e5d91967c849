"""``save_pretrained`` of a model that has adapters: it writes the adapter, which PEFT loads, and nothing of the model.

transformers would write the adapters' parameters under names that ``from_pretrained`` does not know, and take the
adapted weights for missing ones: fresh random numbers, without an error. So the method is replaced on the model itself;
whoever asks it (``Trainer``, ``push_to_hub``) gets the adapter.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from adalora_dist.artifacts.adapter_files import task_settings
from adalora_dist.artifacts.peft_check import not_verified
from adalora_dist.artifacts.peft_format import save_lora
from adalora_dist.backbones.loaded import note_files, refuse_lost_parts
from adalora_dist.backbones.names import plain_model
from adalora_dist.config.methods import MethodConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods import METHODS, inject
from adalora_dist.methods.protocol import (
    Adapter,
    Method,
    TrainedModule,
    adapters_of,
    carries_peft,
    others_trained,
    plain_path,
)
from adalora_dist.methods.update import AdapterWeights, Update, can_be_lora
from adalora_dist.sharding.packing import Pack, holder, pack_of, part_of
from adalora_dist.sharding.tensors import full_shape, is_whole, whole_tensor

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
    if not adapters_of(model) and not carries_peft(model):
        note_files(model)
    adapters = inject.adapt(model, config, seed)
    save_as_adapter(model, METHODS[config.method])
    return adapters


def save_as_adapter(model: nn.Module, method: type[Method]) -> SaveAdapter | None:
    """Make ``model.save_pretrained`` write the adapter.

    Args:
        model: not wrapped, as ``adapt`` left it; nothing is done to one that does so already, nor to one that is none
            of transformers' and has such a one inside, which its own ``save_pretrained`` asks (sentence-transformers).
        method: of its adapters.

    Returns:
        What does it; None where there is no adapter, or no ``save_pretrained``.
    """
    present = getattr(model, "save_pretrained", None)
    part: Any = model if isinstance(model, PreTrainedModel) else adapted_part(model)
    if isinstance(saver := getattr(part, "save_pretrained", None), SaveAdapter):
        return saver
    if present is None or not adapters_of(model):
        return None
    saver = SaveAdapter(model, method)
    model.save_pretrained = saver  # type: ignore[assignment]
    return saver


def adapted_part(model: nn.Module) -> nn.Module:
    """The model that ``adapt`` was given, of whatever has been put around it; ``model`` itself where there is none."""
    parts = (part for part in model.modules() if isinstance(part.__dict__.get("save_pretrained"), SaveAdapter))
    return next(parts, model)


class SaveAdapter:
    """What ``model.save_pretrained`` is, for a model that has adapters.

    The folder gets adapter_model.safetensors and adapter_config.json: plain LoRA of the function that the model
    computes now. Triplets whose lambda is 0 have no part in that and are left out, so that a pattern that is frozen
    gives the budget's triplets, and one that is not yet, all that are alive. What is trained besides goes with it:
    what was trainable when this was made, or is now.
    """

    def __init__(self, model: nn.Module, method: type[Method]) -> None:
        self._model, self._method = model, method
        self._others = {name for name in self._trained_besides() if not self._is_base(name)}
        self._held: Mapping[str, torch.Tensor] | None = None
        self._was_asked = False

    def saves(self, model: nn.Module) -> bool:
        """Whether it is ``model`` that is saved, and not a part of it."""
        return self._model is model

    @contextmanager
    def holding(self, state: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Have ``state`` for calls without a ``state_dict``, as they come from a model around this one.

        Raises:
            UserError: at the end, if there was no call: what was written is not the adapter.
        """
        self._held, self._was_asked = state, False
        try:
            yield
            if not self._was_asked:
                raise UserError(
                    f"what lies around {type(self._model).__name__} was saved without asking it, so that its adapter "
                    "is not in the folder: call save_pretrained of the model that has the adapters"
                )
        finally:
            self._held = None

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
            UserError: as :meth:`check`; parameters are sharded and ``state_dict`` is not given, or lacks some; PEFT
                would load another function.
        """
        self._was_asked = True
        if not is_main_process:
            return
        state_dict = self._held if state_dict is None else state_dict
        ordinary = {"push_to_hub": False, "variant": None, "safe_serialization": True}
        for option, value in ordinary.items():
            if options.get(option, value) != value:
                raise UserError(
                    f"save_pretrained({option}={options[option]!r}) of a model with adapters is not supported: leave "
                    "it out; model.push_to_hub(repo_id) uploads the adapter"
                )
        self.check()
        given = None if state_dict is None else {plain_path(path): value for path, value in state_dict.items()}
        needed, of_adapters = self._needed(), self._of_adapters()
        values = {path: self._value(path, parameter, given) for path, parameter in needed.items()}
        paths = {id(parameter): path for path, parameter in of_adapters.items()}
        owners = (module for module in self._model.modules() if isinstance(module, TrainedModule))
        named = {name: values[paths[id(p)]].float() for owner in owners for name, p in owner.trained().items()}
        named = {path: values[path].float() for path in of_adapters} | named  # fixed ones, as LoRA's lambda, by path
        adapters = adapters_of(self._model)
        named |= {name: value for adapter in adapters for name, value in adapter.past().items()}
        updates = self._method.updates(
            {adapter.name: adapter.description() for adapter in adapters},
            {adapter.name: adapter.held() for adapter in adapters},
            None,
            named.get,
        )
        trained = {path: value for path, value in values.items() if path not in of_adapters}
        _write(self._model, alive([_low_rank(update) for update in updates]), trained, Path(save_directory))

    def check(self) -> None:
        """Whether the adapter can be saved at all, as far as is known beforehand.

        Raises:
            UserError: the method leaves no LoRA, the model is none of transformers', a part of it was adapted alone,
                the backbone is trained, a part of the model is neither in its files nor trained, or what is trained is
                no part of its class.
        """
        model: Any = self._model
        if not hasattr(getattr(model, "config", None), "to_dict"):
            raise UserError(
                f"{type(model).__name__} is no model of transformers', so PEFT could not load its adapter: adapt the "
                "transformers model inside of it"
            )
        if not can_be_lora(self._method.update):
            raise _no_lora(next(name for name, method in METHODS.items() if method is self._method))
        for path, module in model.named_modules():
            if isinstance(module, Adapter) and plain_path(path) != module.path:
                raise UserError(
                    f"the adapter of {module.name} lies at {path} of {type(model).__name__}, of which a part was "
                    "adapted: save that part"
                )
        if unfrozen := [name for name in self._trained_besides() if self._is_base(name)]:
            raise UserError(
                f"{unfrozen[0]} has requires_grad=True, as if the backbone had been trained, which an adapter cannot "
                "hold: call model.requires_grad_(False) first if it was not, or use merge"
            )
        self._check_class()
        adapted = {f"{adapter.name}.weight" for adapter in adapters_of(model)}
        refuse_lost_parts(model, adapted, self._others.union(self._trained_besides()))

    def _check_class(self) -> None:
        """Whether what is trained besides would be found again in a model of this class and configuration."""
        model: Any = self._model
        needed, own = self._needed(), self._of_adapters()
        besides = {path: full_shape(p) for path, p in needed.items() if path not in own}
        plain = plain_model(model.config, task_settings(model)) if besides else None
        if plain is None:
            return
        shapes = {name: p.shape for name, p in plain.named_parameters(remove_duplicate=False)}
        if odd := next((path for path, shape in besides.items() if shapes.get(path) != shape), None):
            raise UserError(
                f"{odd} is trained, and {type(model).__name__} as config.json makes it has no such parameter of this "
                "size: whoever loads the result would not find it; give the number of labels to from_pretrained "
                "(num_labels) in place of another head, or save nothing in PEFT's form (save_strategy='no', and "
                "torch.save of that module)"
            )

    def state(self, keep: bool = True) -> dict[str, torch.Tensor]:
        """The ``state_dict`` that a call needs, whole, on the CPU. Collective where an engine shards parameters.

        What is gathered for a forward has to be given up before
        (:func:`adalora_dist.sharding.tensors.release_gathered`).

        Args:
            keep: false on processes that only take part; they get nothing, one tensor in memory at a time.
        """
        of_holder: dict[int, dict[str, torch.Tensor]] = {}
        for path, parameter in self._needed().items():
            of_holder.setdefault(id(holder(parameter)), {})[path] = parameter
        state: dict[str, torch.Tensor] = {}
        for parameters in of_holder.values():  # a pack is gathered once
            whole = whole_tensor(holder(next(iter(parameters.values()))))
            if keep:
                state |= {path: part_of(whole, parameter).cpu() for path, parameter in parameters.items()}
        return state

    def _value(self, path: str, parameter: torch.Tensor, given: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
        if given is None:
            if not is_whole(parameter):
                raise UserError(
                    f"{path} is sharded over processes: call trainer.save_model(folder) on every process instead of "
                    "model.save_pretrained"
                )
            return whole_tensor(parameter).cpu()
        if path in given:
            return given[path].detach().cpu()
        if (pack := pack_of(parameter)) is not None and (flat := given.get(self._flat_path(pack))) is not None:
            return part_of(flat.detach(), parameter).cpu()  # as model.state_dict() has it
        raise UserError(f"state_dict lacks {path}, which the adapter needs: pass the whole state, or none")

    def _flat_path(self, pack: Pack) -> str:
        path = next(path for path, module in self._model.named_modules() if module is pack.block)
        return plain_path(f"{path}.{pack.leaf}" if path else pack.leaf)

    def is_whole(self) -> bool:
        """Whether every process has all that :meth:`state` gives, so that it takes no other."""
        return all(is_whole(parameter) for parameter in self._needed().values())

    def _of_adapters(self) -> dict[str, nn.Parameter]:
        return {
            plain_path(f"{path}.{leaf}"): parameter
            for path, module in self._model.named_modules()
            if isinstance(module, TrainedModule)
            for leaf, parameter in module.own_parameters().items()
        }

    def _needed(self) -> dict[str, nn.Parameter]:
        """Parameters by path: of the adapters, and what is trained besides. A tied weight is there under each name."""
        besides = {plain_path(path): p for path, p in self._model.named_parameters(remove_duplicate=False)}
        others = sorted(self._others.union(self._trained_besides()))
        return self._of_adapters() | {path: besides[path] for path in others}

    def _trained_besides(self) -> list[str]:
        return [plain_path(name) for name, _ in others_trained(self._model)]

    def _is_base(self, path: str) -> bool:
        """Whether a parameter is one of a matrix that an adapter lies around, or a stack of experts with one."""
        names = [adapter.name for adapter in adapters_of(self._model)]
        return path in names or path.startswith(tuple(f"{name}.base." for name in names))


def _low_rank(update: Update) -> AdapterWeights:
    """``update`` as a sum of low rank, which is all that is written here."""
    if (weights := update.as_lora()) is None:
        raise _no_lora(update.method)
    return weights


def _no_lora(method: str) -> UserError:
    return UserError(
        f"what method {method} leaves is no plain LoRA, which save_pretrained of an adapted model and checkpoints of "
        "Trainer's hold: use save_adapter or merge of adalora_dist (in Trainer save_strategy='no', and then "
        "trainer.adalora.merge_and_save, or save_adapter of trainer.adalora.hooks.updates())"
    )


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
