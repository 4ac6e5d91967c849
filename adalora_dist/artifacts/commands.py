"""What the subcommands of ``adalora-dist`` do with a run folder: export it, look at it."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from adalora_dist.artifacts.adapter_files import checked_task
from adalora_dist.artifacts.auto_classes import auto_class, label_options
from adalora_dist.artifacts.checkpoints.content import stored_adapters
from adalora_dist.artifacts.checkpoints.files import step_of
from adalora_dist.artifacts.checkpoints.writer import checkpoint_at, newest_checkpoint
from adalora_dist.artifacts.export import SavedAdapter, read_adapter
from adalora_dist.artifacts.formats import FORMATS, Options, as_lora
from adalora_dist.artifacts.hub.pictures import draw_history, rank_pictures, read_history, refuse_others_pictures
from adalora_dist.artifacts.peft_format import fold
from adalora_dist.artifacts.tables import rank_table
from adalora_dist.backbones.dequantized import QuantizedWeight, read_quantization_record
from adalora_dist.backbones.load import dtype_named
from adalora_dist.config.formats import EXPORT_FORMATS, ExportFormat
from adalora_dist.config.methods import METHODS, is_method
from adalora_dist.io.errors import UserError, printable
from adalora_dist.io.foreign_files import read_object, read_sections
from adalora_dist.io.markdown import number
from adalora_dist.io.terminal import say
from adalora_dist.methods.dylora import at_rank
from adalora_dist.methods.update import AdapterWeights


def _newest_of_peft(folder: Path) -> Path | None:
    """The adapter in PEFT's form that ``folder`` is, or that its newest checkpoint of Trainer's is; None: neither."""
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name), reverse=True)
    return next((path for path in (folder, *checkpoints) if (path / "adapter_config.json").is_file()), None)


@dataclass(frozen=True)
class FinishedRun:
    """A run folder, read. Of an adapter folder that stands alone, the settings are empty."""

    path: Path
    saved: SavedAdapter
    settings: dict[str, dict[str, Any]]
    """config.yaml: the resolved configuration."""
    facts: dict[str, Any]
    """run.json: versions, command, sizes."""

    @classmethod
    def read(cls, path: Path) -> FinishedRun:
        """
        Args:
            path: of a finished run, which holds adapter/, of one of its checkpoints, or of an adapter folder.

        Raises:
            UserError: it is none of them.
        """
        if step_of(path) is not None:
            return cls._read_checkpoint(path)
        folder = path / "adapter" if (path / "adapter").is_dir() else path
        settings = read_sections(file) if (file := path / "config.yaml").is_file() else {}
        if not (folder / "adapter.json").is_file():
            method: Any = settings.get("adapter", {}).get("method")
            if is_method(method) and not METHODS[method].has_adapters:
                raise UserError(
                    f"{path} has no adapters: a run with method {method} has none; its model is {path / 'merged'}, "
                    "and adalora-dist report shows the run"
                )
            why = "it has no adapter/adapter.json" if path.is_dir() else "there is no such folder"
            remedy = "give a run's output_dir, or one of its checkpoints"
            if newest := newest_checkpoint(path / "checkpoints"):
                remedy = f"give its newest checkpoint, {newest.path}"
            elif settings:
                remedy = f"it has come to no checkpoint; adalora-dist watch {path} shows how far it is"
            elif of_peft := _newest_of_peft(path):
                remedy = (
                    f"{of_peft} is an adapter that PEFT loads, as Trainer writes it: PeftModel.from_pretrained(base, "
                    "folder), and of that merge_and_unload() for a merged model"
                )
            raise UserError(f"{path} is no finished run ({why}): {remedy}")
        saved = read_adapter(folder)
        facts = read_object(file) if (file := path / "run.json").is_file() else {}
        return cls(path, saved, settings, facts)

    @classmethod
    def read_latest(cls, path: Path) -> FinishedRun:
        """A finished run, or of one that was interrupted, or is under way, its newest whole checkpoint.

        Raises:
            UserError: it is no run, or has come to no checkpoint yet.
        """
        is_finished = any((folder / "adapter.json").is_file() for folder in (path, path / "adapter"))
        newest = None if is_finished else newest_checkpoint(path / "checkpoints")
        return cls.read(path if newest is None else newest.path)

    @classmethod
    def _read_checkpoint(cls, path: Path) -> FinishedRun:
        checkpoint = checkpoint_at(path)
        try:
            settings = checkpoint.run["config"]
            adapters, trained = stored_adapters(checkpoint)
            method, model = settings["adapter"]["method"], settings["model"]
            base, task = str(model["name"]), checkpoint.run["task"]
            facts = read_object(file) if (file := path.absolute().parents[1] / "run.json").is_file() else {}
            known = (facts.get("base_commit"), model["revision"])
            revision = next((r for r in known if isinstance(r, str)), None)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{path} does not describe the adapters of a run ({error!r}): give another") from error
        if not adapters:
            raise UserError(f"{path} has no adapters: a run with method {method} has none")
        return cls(path, SavedAdapter(adapters, base, revision, trained, checked_task(task, str(path))), settings, {})

    @property
    def folder(self) -> Path:
        """Of the run: a checkpoint lies in RUN/checkpoints."""
        return self.path if step_of(self.path) is None else self.path.absolute().parents[1]

    @property
    def is_quantized(self) -> bool:
        return bool(self.settings.get("quantization", {}).get("quantization", "none") != "none")

    def usage(self, to: ExportFormat, out: Path, base: str) -> str:
        """Lines of Python that load an export, and for LoRA the options that vLLM needs."""
        task = self.saved.task
        auto = auto_class(task.get("architectures", [""])[0], unknown="AutoModelForCausalLM")
        revision = self.saved.base_revision if base == self.saved.base_model else None
        labels = label_options(task, base, revision)
        at = f", revision={revision!r}" if revision else ""
        form = FORMATS[to]
        if not form.is_adapter:
            return f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({str(out)!r})"
        lines = (
            "from peft import PeftModel\n"
            f"from transformers import {auto}\n\n"
            f"model = PeftModel.from_pretrained({auto}.from_pretrained({base!r}{at}{labels}), {str(out)!r})"
        )
        if form.vllm_options and auto == "AutoModelForCausalLM":
            lines += f"\n\nvLLM: {form.vllm_options(out)}"
        return lines


def export_run(
    path: Path,
    to: ExportFormat,
    out: Path | None = None,
    base: str | None = None,
    dtype: str = "auto",
    merge_into: Literal["original", "dequantized"] | None = None,
    max_rank: int | None = None,
    fold_ranks: bool = False,
    pad: bool = False,
    rank: int | None = None,
) -> None:
    """Write a run in one of the forms of ``formats.py``, and say how to use it.

    Args:
        path: see :meth:`FinishedRun.read`.
        out: must not exist; default: a folder in the run, named after the format.
        base: Hub id or folder of the base model, where it is not what the run was trained on (it has moved).
        dtype: of what is written; auto: as the base's files, or float32 for adapters.
        merge_into: weights that a quantised run's adapters are added to; default: as the run was configured.
        max_rank: refuse adapters with a higher rank.
        fold_ranks: cut ranks above ``max_rank`` by truncated SVD instead, and say what it costs.
        pad: lora with one rank and one alpha for all matrices, see :func:`save_lora`.
        rank: of adapters that serve at many ranks (dylora), the one to write; default: the largest.

    Raises:
        UserError: the run cannot be read, or not written in this form.
    """
    run = FinishedRun.read(path)
    if out is None and step_of(path) is not None:
        raise UserError(f"{path} is a checkpoint, and nothing is written into those: give --out FOLDER")
    if out is not None and step_of(path) is not None and out.resolve().parent == run.folder.resolve():
        raise UserError(
            f"--out {out} is in the run's own folder, where the export of {path.name} would be taken for that of the "
            "finished run: give a folder elsewhere"
        )
    out = path / to if out is None else out
    if out.exists():
        raise UserError(f"--out {out} exists: give another folder, or remove it")
    saved, form = run.saved, FORMATS[to]
    _check_form(saved, to)
    if base and base != saved.base_model:
        saved = replace(saved, base_model=base, base_revision=None)
    if rank is not None:
        saved = replace(saved, adapters=at_rank(saved.adapters, rank))
    if max_rank is not None:
        of_base = Options(base_weights=_quantized(run, saved))
        saved = replace(saved, adapters=_within(as_lora(saved, of_base), max_rank, fold_ranks))
    base_weights = None
    if form.is_adapter:
        base_weights = _quantized(run, saved)
    else:
        into = merge_into or run.settings.get("export", {}).get("merge_into", "original")
        base_weights = read_quantization_record(run.folder / "quantized.json") if into == "dequantized" else None
        if run.is_quantized and into == "original":
            say("warning: the adapters were trained over quantised weights and are merged into the original ones;")
            say("warning: --merge-into dequantized gives exactly what was trained (docs/quantization.md)")
    if said := form.write(saved, out, Options(dtype_named(dtype), base_weights, pad=pad)):
        say(f"{out}: {said}")
    say(f"Wrote {out}. To use it:\n\n{run.usage(to, out, saved.base_model)}")


def _forms_of(saved: SavedAdapter) -> Collection[str]:
    method = saved.adapters[0].method if saved.adapters else ""
    return METHODS[method].formats if method else EXPORT_FORMATS


def _check_form(saved: SavedAdapter, to: ExportFormat) -> None:
    """Whether the method can be written so: a configuration is asked before training, and a folder here."""
    if to not in (formats := _forms_of(saved)):
        method, able = saved.adapters[0].method, " or ".join(form for form in EXPORT_FORMATS if form in formats)
        remedy = f"use --to {able}" if able else "load its adapter folder with load_adapter(model, folder)"
        raise UserError(f"--to {to}: what method {method} leaves cannot be written so; {remedy}")


def _quantized(run: FinishedRun, saved: SavedAdapter) -> dict[str, QuantizedWeight] | None:
    """What adapters are made of that need the base's weights, where it was quantised."""
    if not run.is_quantized or all(a.as_lora() is not None for a in saved.adapters):
        return None
    return read_quantization_record(run.folder / "quantized.json")


def _within(adapters: list[AdapterWeights], max_rank: int, fold_ranks: bool) -> list[AdapterWeights]:
    above = [a for a in adapters if a.rank > max_rank]
    if above and not fold_ranks:
        raise UserError(
            f"--max-rank {max_rank}: {len(above)} matrices have a higher rank ({above[0].name} has {above[0].rank}), "
            f"up to {max(a.rank for a in above)}; raise it, or add --fold to cut them by truncated SVD"
        )
    folded, cost = fold(adapters, max_rank)
    if above:
        say(
            f"Folded {cost.num_matrices} of {len(adapters)} matrices to rank {max_rank}. Relative error of the update: "
            f"{cost.largest_error:.1e} at most, {cost.total_error:.1e} over all matrices"
        )
    return folded


def inspect_run(path: Path, picture_format: Literal["svg", "png", "none"] = "svg") -> None:
    """Print ranks, sizes and how to use a run; draw ranks and history into its folder, as SVG or PNG.

    Of a run that was interrupted, or is under way, ranks and sizes are those of its newest checkpoint.

    Raises:
        UserError: the run cannot be read, matplotlib is not installed, or a picture's name is that of somebody's file.
    """
    if step_of(path) is not None:
        raise UserError(f"{path} is a checkpoint: give the run's folder, {path.absolute().parents[1]}")
    run = FinishedRun.read_latest(path)
    if (step := step_of(run.path)) is not None:
        say(f"The run is not finished: this is its newest checkpoint, after step {step:,}\n")
    pattern = {a.name: a.rank for a in run.saved.adapters}
    history = read_history(path / "allocations.jsonl")
    if picture_format != "none":
        refuse_others_pictures(pattern, path, picture_format, bool(history))
    say("Active ranks\n" + rank_table(pattern) + "\n")
    active = sum(tensor.numel() for a in run.saved.adapters for tensor in a.tensors().values())
    whole = sum(math.prod(a.matrix.shape) for a in run.saved.adapters)
    revision = run.saved.base_revision
    say(f"Base model: {printable(run.saved.base_model)}" + (f" at {printable(revision)}" if revision else ""))
    if "num_trainable_parameters" in run.facts:
        say(f"Trained parameters at the start: {number(run.facts['num_trainable_parameters'])}")
    say(
        f"Active adapter parameters: {active:,} in {sum(rank > 0 for rank in pattern.values())} of {len(pattern)} "
        f"matrices, {active / whole:.2%} of the matrices' own {whole:,}"
    )
    if history:
        returned = sum(record["returned"] for record in history)
        say(
            f"Allocations: {len(history)}, at steps {history[0]['step']} to {history[-1]['step']}; budget "
            f"{history[0]['budget']} -> {history[-1]['budget']}; triplets that came back after pruning: {returned}"
        )
    found = [name for name in EXPORT_FORMATS if (path / name).is_dir()]
    for name in found:
        say(f"\nTo use {path / name}:\n\n{run.usage(name, path / name, run.saved.base_model)}")
    if not found:
        able = [form for form in EXPORT_FORMATS if form in _forms_of(run.saved)]
        into = "" if step is None else " --out FOLDER"
        if able:
            *others, last = able
            forms = f"{', '.join(others)} or {last}" if others else last
            say(f"\nNot exported yet: adalora-dist export {run.path}{into} --to {forms}")
        elif step is None:
            say(f"\nTo use it: load_adapter(model, {str(run.path / 'adapter')!r})")
        else:
            say("\nIts adapter folder is written when the run is finished")
    if picture_format != "none":
        drawn = rank_pictures(pattern, path, picture_format)
        if history:
            drawn.append(path / f"history.{picture_format}")
            draw_history(history, drawn[-1])
        say(f"\nPictures: {', '.join(map(str, drawn))}")
