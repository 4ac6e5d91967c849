"""What a checkpoint holds: everything that training changed, by name and in elements of the whole tensors.

Per trained parameter NAME (for adapters MATRIX.P and MATRIX.Qt, and adalora.lam of all matrices) the spans that a rank
holds of its values (key NAME), of the optimizer's moments (exp_avg/NAME, ...) and of the importance averages
(sensitivity/NAME, uncertainty/NAME). What a method keeps besides (kept/NAME) has shapes and spans of its own.
Nothing says how the run was sharded: who continues it reads whatever overlaps the spans it holds itself, so that engine
and number of processes may change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import parse_object
from adalora_dist.methods import METHODS
from adalora_dist.methods.hooks import MethodHooks
from adalora_dist.methods.protocol import Adapter, StepState
from adalora_dist.methods.update import Update
from adalora_dist.sharding import select_engine
from adalora_dist.sharding.agreement import agreed, this_rank
from adalora_dist.sharding.base import ShardEngine, Span

_PATTERNS = "patterns"
_KEPT = "kept"
"""Kind of what lies along no parameter, which has spans of its own."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    path: Path
    step: int
    """Optimizer steps done."""
    state: dict[str, Any]
    """The content of state.json."""
    files: tuple[str, ...]
    """Names of the files that the manifest vouches for; nothing else is read."""

    @property
    def run(self) -> dict[str, Any]:
        """What :meth:`CheckpointWriter.save` was given to keep."""
        run: dict[str, Any] = self.state["run"]
        return run

    def read(self, name: str) -> bytes:
        """The content of one of the files that :meth:`CheckpointWriter.save` was given to keep."""
        return (self.path / name).read_bytes()


@dataclass(frozen=True)
class Shard:
    """What one rank holds, on the CPU."""

    tensors: dict[str, torch.Tensor]
    spans: dict[str, Span]


def snapshot(step: int, names: Sequence[str], engine: ShardEngine, hooks: MethodHooks) -> tuple[Shard, dict[str, Any]]:
    """A copy of everything that training changed, and the description of it."""
    learnt, adapters = hooks.state(), hooks.method_step.adapters
    averages = dict(zip(hooks.method_step.parameters(), learnt.averages, strict=False))
    tensors: dict[str, torch.Tensor] = {_PATTERNS: learnt.patterns} if this_rank() == 0 else {}
    spans, table = {}, {}
    parts = zip(names, engine.shapes(), engine.spans(), engine.values(), engine.states(), strict=True)
    for name, shape, span, values, state in parts:
        moments = {kind: value for kind, value in state.items() if kind != "step"}
        held = {"": values, **moments, **averages.get(name, {})}
        if span.stop > span.start:
            spans[name] = span
            tensors |= {_key(kind, name): value.detach().flatten().to("cpu", copy=True) for kind, value in held.items()}
        table[name] = {
            "shape": list(shape),
            "step": float(state["step"]) if "step" in state else None,
            "state": sorted(moments),
        }
    for name, kept in learnt.kept.items():
        if kept.values is not None and kept.span.stop > kept.span.start:
            spans[name], tensors[_key(_KEPT, name)] = kept.span, kept.values
    description = {
        "step": step,
        "allocator": learnt.numbers,
        "parameters": table,
        "kept": {name: list(kept.shape) for name, kept in learnt.kept.items()},
        "triplets": {adapter.name: adapter.held() for adapter in adapters},
        "matrices": {adapter.name: adapter.description() for adapter in adapters},
    }
    return Shard(tensors, spans), description


def _key(kind: str, name: str) -> str:
    return f"{kind}/{name}" if kind else name


def writes_shard(engine: ShardEngine) -> bool:
    """Whether this rank belongs to the first replica."""
    if engine.shard_group is None:
        return this_rank() == 0
    return 0 in dist.get_process_group_ranks(engine.shard_group)


def held_parts(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> dict[str, list[int]]:
    """For each adapter, by name, which of its original parts (triplets) the checkpoint has.

    Raises:
        UserError: the checkpoint is of other matrices.
    """
    held: dict[str, list[int]] = checkpoint.state["triplets"]
    if list(held) != [adapter.name for adapter in adapters]:
        raise UserError(
            f"{checkpoint.path} is of {len(held)} other adapted matrices ({', '.join(list(held)[:2])} ...): give the "
            "model and the targets of the run that it is of"
        )
    for adapter in adapters:
        stored, own = checkpoint.state["matrices"][adapter.name], adapter.description()
        if other := [key for key in own if stored.get(key) != own[key]]:
            raise UserError(
                f"{checkpoint.path}: {adapter.name} has another {' and '.join(other)} there ({stored.get(other[0])}, "
                f"here {own[other[0]]}): continue with the settings, and the version of torch, of the run that it is of"
            )
    return held


def load_checkpoint(
    checkpoint: Checkpoint, parameters: Mapping[str, torch.Tensor], optimizer: Any, hooks: MethodHooks
) -> None:
    """Put weights, the optimizer's state and the method's into a prepared run, before its first step. Collective.

    Args:
        parameters: all that is trained, from :func:`~adalora_dist.methods.protocol.trained_parameters`.
        optimizer: as the engine wraps it.
        hooks: attached to it.

    Raises:
        UserError: a parameter, a part of it or a part of its state is missing, or of another shape.
    """
    hooks.bind(optimizer)
    engine = select_engine(list(parameters.values()), optimizer)

    def read() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]], StepState]:
        with ExitStack() as stack:
            stored = _Stored(checkpoint, stack)
            stored.compare(dict(zip(parameters, engine.shapes(), strict=True)))
            spans = dict(zip(parameters, engine.spans(), strict=True))
            values = [stored.part("", name, span) for name, span in spans.items()]
            states = [stored.optimizer_state(name, span) for name, span in spans.items()]
            kinds = zip(hooks.method_step.parameters(), hooks.state().averages, strict=False)
            averages = [{kind: stored.part(kind, name, spans[name]) for kind in held} for name, held in kinds]
            # Methods without adapters once kept nothing of their own.
            numbers = {"step": checkpoint.step, "num_skipped_steps": 0} | checkpoint.state["allocator"]
            asked = hooks.method_step.kept(numbers)
            kept = {n: k._replace(values=stored.part(_KEPT, n, k.span)) for n, k in asked.items()}
            return values, states, StepState(numbers, stored.patterns(), averages, kept)

    values, states, learnt = agreed(read, keep=False)
    engine.restore(values, states)
    hooks.load_state(learnt)


def stored_adapters(checkpoint: Checkpoint) -> tuple[Sequence[Update], dict[str, torch.Tensor]]:
    """What every adapted matrix has become, and what is trained besides, whole. Needs no model and no process.

    Raises:
        UserError: something is missing.
        KeyError: the run is of no known method.
    """
    table, described = checkpoint.state["parameters"], checkpoint.state["matrices"]
    kept: dict[str, list[int]] = checkpoint.state.get("kept", {})
    method = METHODS[checkpoint.run["config"]["adapter"]["method"]]
    of_adapters: set[str] = set()
    with ExitStack() as stack:
        stored = _Stored(checkpoint, stack)

        def whole(name: str) -> torch.Tensor | None:
            of_adapters.add(name)
            if name in kept:
                return stored.part(_KEPT, name, Span(0, math.prod(kept[name]))).view(kept[name])
            if name not in table:
                return None
            shape = table[name]["shape"]
            return stored.part("", name, Span(0, math.prod(shape))).view(shape).float()

        patterns = stored.patterns()
        keep = patterns[-1] if len(patterns) else None
        adapters = method.updates(described, checkpoint.state["triplets"], keep, whole)
        trained = {name: whole(name) for name in table if name not in of_adapters}
        return adapters, {name: tensor for name, tensor in trained.items() if tensor is not None}


class _Stored:
    """The shards of a checkpoint, open for reading."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self._path, self._table = checkpoint.path, checkpoint.state["parameters"]
        self._where: dict[str, list[tuple[Span, Any]]] = {}
        self._first: Any = None
        for name in sorted(name for name in checkpoint.files if name.endswith(".safetensors")):
            path = checkpoint.path / name
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} cannot be read ({error}): all processes must see the same folder") from error
            self._first = self._first or file
            for parameter, (start, stop) in parse_object(file.metadata()["spans"].encode(), str(path)).items():
                self._where.setdefault(parameter, []).append((Span(start, stop), file))

    def compare(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise unless the checkpoint is of exactly these parameters."""
        for name in [*shapes, *self._table]:
            stored = tuple(self._table[name]["shape"]) if name in self._table else "not there"
            needed = tuple(shapes[name]) if name in shapes else "not there"
            if stored != needed:
                raise UserError(
                    f"{self._path}: parameter {name} is {stored} in the checkpoint and {needed} in this run: continue "
                    "with the model and the settings of the run that it is of"
                )

    def part(self, kind: str, name: str, span: Span) -> torch.Tensor:
        """Elements [start, stop) of one quantity of a parameter, from whichever shards have them."""
        parts: list[torch.Tensor] = []
        position = span.start
        for held, file in sorted(self._where.get(name, []), key=lambda item: item[0]):
            start, stop = max(position, held.start), min(span.stop, held.stop)
            if start == position and start < stop:
                try:
                    parts.append(file.get_slice(_key(kind, name))[start - held.start : stop - held.start])
                except SafetensorError:
                    break
                position = stop
        if position < span.stop:
            raise UserError(
                f"{self._path}: {kind or 'values'} of {name} from element {position} on are missing: the checkpoint is "
                "not complete, use another"
            )
        return torch.cat(parts) if parts else torch.empty(0)

    def optimizer_state(self, name: str, span: Span) -> dict[str, torch.Tensor]:
        described = self._table[name]
        moments = {kind: self.part(kind, name, span) for kind in described["state"]}
        return moments if described["step"] is None else {"step": torch.tensor(described["step"]), **moments}

    def patterns(self) -> torch.Tensor:
        patterns: torch.Tensor = self._first.get_tensor(_PATTERNS)
        return patterns
