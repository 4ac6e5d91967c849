"""Before anything is trained: is every part of the model either in its files or trained, and can the result be written?

An answer from names and shapes alone, the same on every engine and on every process.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from adalora_dist.artifacts.edits import rearranged_edits
from adalora_dist.artifacts.export import check_base
from adalora_dist.backbones.expert_files import parts_of
from adalora_dist.backbones.experts import ExpertStack
from adalora_dist.backbones.linears import is_conv1d, linear_shape
from adalora_dist.backbones.loaded import refuse_lost_parts
from adalora_dist.backbones.names import FileNames, layers_left_out
from adalora_dist.backbones.parts import is_under, tower_names
from adalora_dist.backbones.rearranged import is_rearranged
from adalora_dist.config.engines import BACKBONE_SHARDING
from adalora_dist.config.sections import RunConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods import method_for
from adalora_dist.methods.adalora.experts import ExpertTriplets
from adalora_dist.methods.protocol import adapters_of, others_trained


def check_backbone(model: nn.Module, config: RunConfig) -> list[str]:
    """Refuse a run with a frozen part that is random, or one whose merged model could not be written.

    Args:
        model: with adapters, before the engine has it. Without ``file_names`` (not from ``load_backbone``) nothing is
            known about its files, and nothing is checked.

    Returns:
        Lines for the console: what the model leaves out of its files, and what is new.

    Raises:
        UserError: see above.
    """
    names = cast("FileNames | None", getattr(model, "file_names", None))
    if names is None:
        return []
    adapted, trained = _adapted(model), {name for name, _ in others_trained(model)}
    refuse_lost_parts(model, adapted, trained)
    for form in config.export.export_formats:
        if why := method_for(config.adapter).lacks(adapters_of(model), form):
            raise UserError(f"export_formats {form}: {why}")
    if config.adapter.formats_from_files.intersection(config.export.export_formats):
        stacks = [adapter.stack for adapter in adapters_of(model) if isinstance(adapter, ExpertTriplets)]
        _check_merge(names, adapted, stacks, trained, config)
    lines = []
    if beyond := layers_left_out(model):
        more = f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
        layers = ", ".join(beyond[:3]) + more
        lines.append(f"In the model's files and not in the model, which by its config.json has fewer layers: {layers}")
    if not names.missing:
        return lines
    shapes = {n.rpartition(".")[0]: " x ".join(map(str, s)) for n, s in names.mismatched.items() if len(s) > 1}
    modules = dict.fromkeys(name.rpartition(".")[0] for name in names.missing)
    listed = ", ".join(f"{m} (in the files {shapes[m]})" if m in shapes else m for m in modules)
    return [*lines, f"Not in the model's files, so new and trained in full: {listed}"]


def refuse_own_layers(model: nn.Module, engine: str, num_processes: int) -> None:
    """Raise if processes would leave out different layers in training, and each be waited for by others for ever.

    Args:
        engine: as :func:`adalora_dist.training.engine.engine_name` says it.

    Raises:
        UserError: the model has ``layerdrop``, and an engine on which a layer's forward is collective.
    """
    if engine not in BACKBONE_SHARDING or num_processes == 1:
        return
    towers = tower_names(model)
    for name, module in model.named_modules():
        share = getattr(module, "layerdrop", None)
        if isinstance(share, float) and share > 0 and not is_under(name, towers):
            side = name.rpartition(".")[2] if name.endswith(("encoder", "decoder")) else ""
            setting = f"{side}_layerdrop" if side else "layerdrop"
            raise UserError(
                f"the model's {setting} is {share:g} (config.json): under {engine} processes would leave out different "
                "layers, and wait for each other for ever; set it to 0, or use ddp, zero1 or zero2"
            )


def _check_merge(
    names: FileNames,
    adapted: dict[str, tuple[int, int]],
    stacks: list[ExpertStack],
    trained: set[str],
    config: RunConfig,
) -> None:
    files = {source.file for sources in names.sources.values() for source in sources}
    if not files:
        raise UserError(
            f"model={config.model.name!r} has no .safetensors files to merge into: save it again with save_pretrained, "
            "or leave merged out of export_formats"
        )
    folder = min(files).parent
    check_base(folder)
    moved = {name for name in {*adapted, *trained} if is_rearranged(names, name)}
    rearranged_edits(dict.fromkeys(sorted(moved), lambda value: value), names)
    names.places({n: s for n, s in adapted.items() if n not in moved}, trained - moved, folder)
    for stack in stacks:
        parts_of(names, stack)


def _adapted(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Shape of the weight of each adapted matrix in the files, by parameter name."""
    found = {}
    for adapter in adapters_of(model):
        if isinstance(adapter, ExpertTriplets) or not adapter.adapts():
            continue
        d_in, d_out = linear_shape(adapter.base) or (0, 0)
        found[f"{adapter.name}.weight"] = (d_in, d_out) if is_conv1d(adapter.base) else (d_out, d_in)
    return found
