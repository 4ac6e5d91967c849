"""Whether a run may continue from a checkpoint, and from which one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pydantic import BaseModel, FiniteFloat, ValidationError

from adalora_dist.artifacts.checkpoints.content import Checkpoint
from adalora_dist.artifacts.checkpoints.files import Damaged, step_of
from adalora_dist.artifacts.checkpoints.writer import checkpoint_at, newest_checkpoint, set_newer_aside
from adalora_dist.config.sections import ModelConfig, RunConfig, TrainConfig
from adalora_dist.io.errors import UserError, printable
from adalora_dist.io.foreign_files import read_bytes
from adalora_dist.io.redaction import redacted
from adalora_dist.sharding.agreement import agreed, this_rank
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.training.best import BEST, Best

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
ALLOCATIONS = "allocations.jsonl"
LOGS = (METRICS, ALLOCATIONS)

# What a continued run may set anew, because it does not change what is learnt: sections, and fields of others.
# ``data`` and the backbone are compared by content instead: files may move.
_FREE_SECTIONS = ("data", "evaluation", "export")
_FREE_FIELDS = (
    *("model.name", "model.revision", "model.trust_remote_code", "model.allow_pickle_weights"),
    *("train.output_dir", "train.overwrite", "train.resume", "train.log_every", "train.trackers"),
    *("train.checkpoint_every", "train.keep_checkpoints", "train.async_checkpoints"),
    *("train.micro_batch_size", "train.micro_batch_tokens", "train.gradient_checkpointing", "train.logits_chunk"),
    *("train.checkpoint_activations", "train.offload_activations", "train.compile", "train.pack_adapters"),
    *("train.fsdp_prefetch", "train.dry_run"),
    "adapter.importance_kernel",
    "train.packing",
    *("train.max_nonfinite_steps", "train.peer_timeout_seconds", "train.max_restarts_at_step"),
    "adapter.compact",
)
_EDGE_BYTES = 1 << 16


def find_checkpoint(config: RunConfig) -> Checkpoint | None:
    """The checkpoint that ``resume`` asks for; None: the run starts at step 0. Changes nothing. Collective.

    Raises:
        UserError: ``resume`` is a path without a whole checkpoint; or auto, and the run in ``output_dir`` has made
            steps but has no checkpoint that can be used; or it was made with other settings.
    """
    train = config.train
    root = Path(train.output_dir) / CHECKPOINTS
    if train.resume == "never":
        return None
    if train.resume == "auto":
        found = newest_checkpoint(root, _check_run)
        if found is None:
            agreed(lambda: refuse_lost_steps(train) if this_rank() == 0 else None)
            return None
    else:
        path = Path(train.resume)
        is_checkpoint = step_of(path) is not None
        found = checkpoint_at(path, _check_run) if is_checkpoint else newest_checkpoint(path / CHECKPOINTS, _check_run)
        if found is None:
            raise UserError(
                f"resume={path} holds no checkpoint: give a folder {CHECKPOINTS}/step-..., a run folder that has some, "
                "or auto"
            )
    _compare_settings(found, config)
    return found


class _Backbone(BaseModel):
    name: str
    revision: str | None
    sha256: str | None


class _RunState(BaseModel):
    """What :class:`RunCheckpoints` keeps of a run, as far as a run that continues reads it."""

    config: dict[str, dict[str, Any]]
    backbone: _Backbone
    notes: dict[str, Any]
    best: Best | None = None
    loss_scale: dict[str, FiniteFloat] | None


def _check_run(checkpoint: Checkpoint) -> None:
    """Raise ``Damaged`` unless a run can be continued from what a checkpoint says of it."""
    where = checkpoint.path / "state.json"
    try:
        _RunState.model_validate(checkpoint.run)
        log = checkpoint.read(METRICS) if METRICS in checkpoint.files else b""
        losses = [json.loads(line)["loss"] for line in log.splitlines()]
    except ValidationError as error:
        first = error.errors()[0]
        raise Damaged(f"{where}: run.{printable('.'.join(map(str, first['loc'])), 100)} ({first['msg']})") from None
    except (ValueError, TypeError, LookupError, RecursionError):
        raise Damaged(f"{checkpoint.path / METRICS} is no log of steps") from None
    if len(losses) != checkpoint.step or not all(isinstance(loss, float | int) for loss in losses):
        raise Damaged(f"{checkpoint.path / METRICS} has {len(losses)} steps, {where.name} {checkpoint.step}")
    if "data" not in checkpoint.run:
        raise Damaged(f"{where}: run.data (Field required)")


def set_later_aside(checkpoint: Checkpoint, train: TrainConfig) -> None:
    """In a run that goes on from one of its own checkpoints, rename the later ones. For the main process."""
    if checkpoint.path.parent.resolve() == (Path(train.output_dir) / CHECKPOINTS).resolve():
        set_newer_aside(checkpoint)
        set_newer_aside(checkpoint, Path(train.output_dir) / BEST)


def continues_in_place(train: TrainConfig) -> bool:
    """Whether ``resume`` is about the run in ``output_dir`` itself."""
    if train.resume in ("auto", "never"):
        return train.resume == "auto"
    return Path(train.resume).resolve().is_relative_to(Path(train.output_dir).resolve())


def refuse_lost_steps(train: TrainConfig) -> None:
    """Raise before a run starts at step 0 in a folder whose run has made steps and is to be continued."""
    metrics = Path(train.output_dir) / METRICS
    if metrics.exists() and metrics.stat().st_size:
        raise UserError(
            f"resume=auto, but the run in output_dir={train.output_dir} has made steps and has no checkpoint: give "
            "--resume PATH, or start anew with --overwrite or in another --output-dir"
        )


# ------------------------------------------------------------------------------------------------ is it the same run?


_BEFORE_IT_WAS_A_SETTING = {"adapter": {"start": "paper"}}
"""What older checkpoints did without saying so, where it is not the default now."""


def _compare_settings(checkpoint: Checkpoint, config: RunConfig) -> None:
    changes = list(_changes(checkpoint, config, free=False))
    if changes:
        raise UserError(
            f"{checkpoint.path} was made with other settings ({', '.join(changes)}): set them back, or start anew in "
            "another --output-dir with --resume never"
        )


def _changes(checkpoint: Checkpoint, config: RunConfig, free: bool) -> Iterator[str]:
    """'adapter.init_rank 12 -> 8' for every setting that differs; those that may, or those that may not."""
    stored, resolved = checkpoint.run["config"], type(config.adapter).resolved
    for section, fields in redacted(config.model_dump(mode="json")).items():
        default, given = getattr(type(config)(), section), getattr(config, section)
        if type(given) is not type(default):  # another method's
            default = type(given)()
        # For settings newer than the checkpoint.
        defaults = default.model_dump(mode="json") | _BEFORE_IT_WAS_A_SETTING.get(section, {})
        old = {field: stored.get(section, {}).get(field, defaults[field]) for field in fields}
        if section == "adapter":
            old, fields = resolved(old), resolved(fields)
        for field, now in fields.items():
            name, then = f"{section}.{field}", old[field]
            if then != now and free == (section in _FREE_SECTIONS or name in _FREE_FIELDS):
                yield f"{name} {then} -> {now}"


def compare_data(checkpoint: Checkpoint, plan: BatchPlan, config: RunConfig) -> None:
    """Raise a ``UserError`` unless every step of the run gets the rows that it had."""
    if checkpoint.run["data"] != plan.fingerprint():
        changes = [c for c in _changes(checkpoint, config, free=True) if c.startswith("data.")]
        raise UserError(
            f"the training rows are not those of {checkpoint.path} ({', '.join(changes) or 'the files have changed'}): "
            "bring the data back, or start anew in another --output-dir with --resume never"
        )


def compare_backbone(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Raise a ``UserError`` unless the backbone is the one that the adapters were trained on."""
    then, now = checkpoint.run["backbone"], redacted(backbone_identity(model))
    known = then["sha256"] is not None and now["sha256"] is not None
    if then["sha256"] != now["sha256"] if known else (then["name"], then["revision"]) != (now["name"], now["revision"]):
        raise UserError(
            f"model={model.name} (revision {model.revision}) is not the backbone of {checkpoint.path}, which was "
            f"{then['name']} (revision {then['revision']}): give that one"
        )


def backbone_identity(model: ModelConfig) -> dict[str, str | None]:
    """Name, revision, and a SHA-256 over the configuration and the names, sizes and ends of the weight files.

    The ends of a safetensors file have its table of tensors and the last of them, those of a pickle the end of its
    archive, which lists a checksum of every tensor: cheap, and different for other sizes, other dtypes and other
    training, not for a change by hand in the middle of a safetensors file. None where the files are not in a local
    folder or the Hub's cache.
    """
    folder: Path | None = Path(model.name)
    if not model.name or not Path(model.name).is_dir():
        folder = _cached_folder(model)
    digest: str | None = None
    if folder is not None:
        sha256 = hashlib.sha256(read_bytes(config) if (config := folder / "config.json").is_file() else b"")
        weights = [path for path in folder.glob("*.safetensors") if path.is_file()]
        weights = weights or [path for path in folder.glob("*.bin") if path.is_file()]
        for path in sorted(weights):
            size_bytes = path.stat().st_size
            sha256.update(f"{path.name} {size_bytes}".encode())
            with path.open("rb") as file:
                sha256.update(file.read(_EDGE_BYTES))
                file.seek(max(0, size_bytes - _EDGE_BYTES))
                sha256.update(file.read())
        digest = sha256.hexdigest()
    return {"name": model.name, "revision": model.revision, "sha256": digest}


def _cached_folder(model: ModelConfig) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.name, "config.json", revision=model.revision) if model.name else None
    return Path(found).parent if isinstance(found, str) else None


# ---------------------------------------------------------------------------------------------------------- loss scale


def loss_scale(accelerator: Accelerator, optimizer: Any) -> dict[str, float] | None:
    """Scale of fp16 gradients, and how many steps without overflow it has had; None without one."""
    if accelerator.scaler is not None:
        state = accelerator.scaler.state_dict()
        return {"scale": state["scale"], "good_steps": state["_growth_tracker"]}
    scaler = getattr(optimizer.optimizer, "loss_scaler", None)  # DeepSpeed's
    if scaler is None or not scaler.dynamic:
        return None
    good_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
    return {"scale": scaler.cur_scale, "good_steps": good_steps, "hysteresis": scaler.cur_hysteresis}


def set_loss_scale(accelerator: Accelerator, optimizer: Any, saved: Mapping[str, float] | None) -> None:
    """Continue with a scale that :func:`loss_scale` gave, on whichever engine; nothing is done where there is none."""
    if saved is None:
        return
    if accelerator.scaler is not None:
        changed = {"scale": saved["scale"], "_growth_tracker": int(saved["good_steps"])}
        accelerator.scaler.load_state_dict({**accelerator.scaler.state_dict(), **changed})
    elif (scaler := getattr(optimizer.optimizer, "loss_scaler", None)) is not None and scaler.dynamic:
        scaler.cur_scale = saved["scale"]
        scaler.cur_iter, scaler.last_overflow_iter = int(saved["good_steps"]), -1
        scaler.cur_hysteresis = int(saved.get("hysteresis", scaler.cur_hysteresis))
