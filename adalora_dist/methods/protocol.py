"""What a method is: the parts that checkpoints, exports, reports, trainers and engines ask, whichever method it is.

A method is one file: its :class:`Method` puts :class:`Adapter` modules into a model, its :class:`Step` acts at every
optimizer step (through ``hooks.py``, alike on every engine), and its updates (``update.py``) say what each matrix has
become. ``methods/__init__.py`` has the table of all methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import nn

from adalora_dist.backbones.experts import stacks_of
from adalora_dist.backbones.linears import linear_shape
from adalora_dist.config.methods import MethodConfig
from adalora_dist.config.sections import TrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.adalora.schedule import BudgetSchedule
from adalora_dist.methods.adapter import Adapter as Adapter
from adalora_dist.methods.adapter import TrainedModule as TrainedModule
from adalora_dist.methods.adapter import adapters_of as adapters_of
from adalora_dist.methods.adapter import carries_peft as carries_peft
from adalora_dist.methods.adapter import others_trained as others_trained
from adalora_dist.methods.adapter import plain_path as plain_path
from adalora_dist.methods.adapter import trained_parameters as trained_parameters
from adalora_dist.methods.sites import put_in_place
from adalora_dist.methods.sizes import Sizes
from adalora_dist.methods.update import AdapterWeights, Matrix, Update
from adalora_dist.sharding.base import ShardEngine, Span


class Kept(NamedTuple):
    """A rank's part of a tensor of the method's own, which lies along no parameter."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    span: Span
    """This rank's elements of it, flattened. Ranks may overlap in equal values; of replicas one has all."""
    values: torch.Tensor | None = None
    """Those elements, flat, float32, on the CPU; None where only shape and span are told."""


class StepState(NamedTuple):
    """All that a method has learnt between two steps; what differs between ranks is in ``averages`` and ``kept``."""

    numbers: dict[str, Any]
    """Plain numbers and lists of them, by name."""
    patterns: torch.Tensor
    """(selections made, parts) bool: every selection so far; (0, 0) where nothing is selected."""
    averages: list[dict[str, torch.Tensor]]
    """Per parameter of :meth:`Step.parameters` what lies along this rank's span of it, by kind."""
    kept: dict[str, Kept] = {}
    """What lies along none of them, by names that no parameter has; the same names on every rank."""


class Step:
    """What a method does at every optimizer step. The default, of plain methods: nothing.

    ``hooks.py`` calls it inside the innermost optimizer's step hooks, where gradients are reduced, unscaled and
    clipped on every engine. Some engines step in several firings; :meth:`before` is called in each of them.
    """

    schedule: BudgetSchedule | None = None
    """How the budget falls over the run; None for methods without a budget."""
    keep: torch.Tensor | None = None
    """(number of parts of all adapters at the start,) bool: what the last selection kept; None: there was none."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = list(adapters)

    def parameters(self) -> dict[str, torch.Tensor]:
        """The parameters that it acts on, by name, as the model has them now, in the same order on every rank."""
        return {name: p for adapter in self.adapters for name, p in adapter.trained().items()}

    def look_at(self, model: nn.Module) -> None:
        """Called once, before all others: the model that is trained, which an engine may have wrapped already."""

    def bind(self, engine: ShardEngine) -> torch.Tensor:
        """Called once the engine has taken over :meth:`parameters`, and again after they were exchanged. Collective.

        Returns:
            A float32 vector, summed over the shard group once in every step, between :meth:`sums` and
            :meth:`before`. Its last element is not the method's: there the hooks count non-finite gradients, and
            leave 1 where the step is to be left out, else 0.
        """
        device = next((v.device for v in engine.values()), torch.device("cpu"))
        return torch.zeros(1, dtype=torch.float32, device=device)

    def start(self, engine: ShardEngine, model: nn.Module, tokens: Sequence[int]) -> None:
        """Called after :meth:`bind` where a run begins whose settings have a ``start_text``. Collective.

        Args:
            model: as the engine wraps it.
            tokens: of that text.

        Raises:
            UserError: the text does not do.
        """

    def begin(self, step: int) -> None:
        """Called before the first forward of ``step``, and once more where a run goes on from there.

        What is drawn for a step is drawn here, from its number: then all ranks, all micro-batches and the second
        forward of a checkpoint see the same, and a run that goes on elsewhere draws it again.
        """

    def rate_factor(self, step: int) -> float:
        """What the hooks multiply the learning rate of ``step`` by, whoever sets it."""
        return 1.0

    def sums(self, step: int) -> None:
        """Called first in a step: write this rank's part of the vector of :meth:`bind`, all but its last element."""

    def summed(self) -> None:
        """Called when that vector has been summed over the shard group."""

    def before(self, is_last: bool) -> None:
        """Called when gradients are there and weights not stepped yet; may change both. Must not read from the device.

        Args:
            is_last: whether this is the last firing of the step.
        """

    def after(self, step: int) -> None:
        """Called when weights are stepped, in all firings."""

    def missed(self, step: int) -> None:
        """Called in place of all others for a step that the engine left out, without calling the optimizer."""

    def notice(self, step: int, learning_rate: Callable[[int], float]) -> str:
        """A line for the console after ``step``, "" for none. Collective; may read from the device.

        Args:
            learning_rate: of each step of the run.
        """
        return ""

    def replaces(self, hooks: Any, model: nn.Module, optimizer: Any) -> str:
        """Between two steps: exchange parameters if that is due. Collective.

        Args:
            hooks: the :class:`~adalora_dist.methods.hooks.MethodHooks` that call this.
            model: as the engine wraps it.
            optimizer: the torch optimizer or any wrapper of it.

        Returns:
            In a few words what was done; "": nothing.
        """
        return ""

    def whole(self, name: str) -> torch.Tensor | None:
        """A tensor of ``kept``, complete, on the CPU; None where there is none of that name."""
        return None

    def state(self, spans: Any) -> StepState:
        """A copy, on the CPU, between two steps."""
        return StepState({}, torch.zeros(0, 0, dtype=torch.bool), [{} for _ in spans])

    def kept(self, numbers: Mapping[str, Any]) -> dict[str, Kept]:
        """What :meth:`load_state` needs of ``kept`` on this rank, of a state with these numbers; without values."""
        return {}

    def load_state(self, state: StepState) -> None:
        """Continue from ``state``, whose averages are of this rank's spans now, and what :meth:`kept` asks for."""

    def problem(self, step: int) -> str | None:
        """Why the run, if it ended now, would not keep what it promised; None if it does."""
        return None

    def check(self) -> None:
        """End of the run: collective checks that ranks agree.

        Raises:
            RuntimeError: they do not.
        """

    def rank_pattern(self) -> dict[str, int]:
        """Active rank of each adapter that has one, by name. Reads from the device."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What run.json says of the method's plan."""
        return {"num_matrices": sum(len(a.matrix_names()) for a in self.adapters)} if self.adapters else {}

    def plan(self) -> str:
        """The plan in a few words for the console; "" without one."""
        return ""

    def record(self, step: int) -> dict[str, float]:
        """What metrics.jsonl says of a past step, beside the loss."""
        return {}

    def report(self) -> dict[str, float]:
        """What logs of a training step get now. Reads from the device; no collective."""
        return {}

    def progress(self) -> str:
        """A few words for the progress line, ending in ", ". Reads from the device."""
        return ""

    def events(self, first: int) -> list[dict[str, Any]]:
        """A record for every event (allocation) from number ``first`` on. Reads from the device."""
        return []

    def buffers(self) -> Iterable[torch.Tensor]:
        """What it keeps along the spans, for reports of memory."""
        return ()


class Method:
    """One method with its settings: how it changes a model, what it does at a step, what it leaves."""

    said: ClassVar[str] = "Weights trained in place"
    """What model cards call its result, before "for" or "merged into" the name of the base."""

    update: ClassVar[type[Update]] = AdapterWeights
    """What each matrix becomes, and so what an adapter folder holds."""

    def __init__(self, config: MethodConfig) -> None:
        self.config = config

    def adapt(self, model: nn.Module, generator: torch.Generator) -> list[Adapter]:
        """Put adapters into a model of which all but ``train_modules`` is frozen; return them in canonical order.

        Raises:
            UserError: a target without a match, or one that cannot be adapted.
        """
        return []

    def sizes(self, model: nn.Module) -> Sizes:
        """The sizes that its adapters can have in a plain ``model``, which may be on meta, for a parameter budget."""
        raise NotImplementedError(f"{type(self).__name__}.sizes")

    def groups(self, model: nn.Module) -> dict[float, list[torch.Tensor]]:
        """The trainable parameters of ``model``, by the factor on their learning rate."""
        return {1.0: [p for p in model.parameters() if p.requires_grad]}

    def undecayed(self, model: nn.Module) -> list[torch.Tensor]:
        """Of the trainable parameters those that weight decay would pull to something else than the plain model."""
        return []

    def parameter_groups(self, model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
        """:meth:`groups` as a torch optimizer takes them; each keeps its factor in ``lr_ratio``.

        What is :meth:`undecayed` has groups of its own. None is empty: DeepSpeed would drop it.
        """
        made: list[dict[str, Any]] = []
        kept = {id(p) for p in self.undecayed(model)}
        for ratio, ps in self.groups(model).items():
            options = {"lr": ratio * learning_rate, "lr_ratio": ratio}
            decayed, others = [p for p in ps if id(p) not in kept], [p for p in ps if id(p) in kept]
            made += [{"params": decayed, **options}] if decayed else []
            made += [{"params": others, **options, "weight_decay": 0.0}] if others else []
        return made

    def optimizer(self, model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
        """AdamW over all trainable parameters of ``model``."""
        return torch.optim.AdamW(
            self.parameter_groups(model, train.learning_rate),
            weight_decay=train.weight_decay,
            fused=train.precision != "fp16",  # its kernel would unscale gradients after the hooks have seen them
        )

    def check_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Raise a ``UserError`` for a torch optimizer under which this method would not do what it says."""
        if missing := self.groups(model).keys() - {group.get("lr_ratio", 1.0) for group in optimizer.param_groups}:
            raise UserError(
                f"lora_plus_ratio={max(missing):g}, but the optimizer gives P and Q one learning rate: make it over "
                "parameter_groups(model, config, learning_rate), or leave lora_plus_ratio at 1"
            )

    def step(self, adapters: Sequence[Adapter], total_steps: int) -> Step:
        """Make what acts at each of ``total_steps`` optimizer steps.

        Raises:
            UserError: settings that do not fit the number of steps.
        """
        return Step(adapters)

    def shrink(self, adapters: Sequence[Adapter], held: Mapping[str, Sequence[int]]) -> None:
        """Reduce adapters to the parts that a checkpoint has of them, before an engine takes the parameters over."""

    def lacks(self, adapters: Sequence[Adapter], form: str) -> str | None:
        """Why what these adapters leave could not be written in a form that the method otherwise has; None: it can."""
        return None

    @classmethod
    def updates(
        cls,
        described: Mapping[str, Mapping[str, Any]],
        held: Mapping[str, Sequence[int]],
        keep: torch.Tensor | None,
        whole: Callable[[str], torch.Tensor | None],
    ) -> Sequence[Update]:
        """What each matrix has become.

        By default: what an adapter folder with these parameters and descriptions would be read as. A tensor of an
        update is the parameter of its name, or that of its name with a t behind it (Qt), transposed.

        Args:
            described: of every adapter, :meth:`Adapter.description` by its name.
            held: of every adapter, :meth:`Adapter.held` by its name.
            keep: (parts of all adapters at the start,) bool, the last selection; None: all are kept.
            whole: the parameter of that name, complete, float32, on the CPU; None where there is none.
        """
        if not described:
            return []
        shared, matrices = next(iter(described.values())), [Matrix.described(*each) for each in described.items()]
        tensors = {
            m.name: {kind: _tensor(f"{m.name}.{kind}", whole) for kind in cls.update.shapes(m, shared)}
            for m in matrices
        }
        return cls.update.read(matrices, tensors, shared)

    @classmethod
    def shapes_in(cls, model: nn.Module) -> Callable[[str], tuple[int, int] | None]:
        """A function from a name to (d_in, d_out) of what an update of that name is of; None: ``model`` lacks it."""
        shapes = {name: linear_shape(module) for name, module in model.named_modules()}
        of_experts = {n: (stack.d_in, stack.d_out) for stack in stacks_of(model) for n in stack.matrix_names()}
        return (of_experts | shapes).get

    @classmethod
    @torch.no_grad()
    def place(cls, model: nn.Module, updates: Sequence[Update]) -> list[Adapter]:
        """Put what :meth:`updates` gave into its plain backbone, in whose shapes it is."""
        layers = []
        for update in updates:
            layer = cls.layer_of(model.get_submodule(update.name), update)
            own = dict(layer.named_parameters(recurse=False))
            for kind, value in update.tensors().items():
                if kind in own:
                    own[kind].copy_(value)
                else:
                    own[f"{kind}t"].copy_(value.T)
            layers.append(put_in_place(model, layer))
        return layers

    @classmethod
    def layer_of(cls, base: nn.Module, update: Any) -> Adapter:
        """The adapter of ``base`` in whose parameters :meth:`place` puts the tensors of ``update``."""
        raise NotImplementedError(f"{cls.__name__}.layer_of")


def _tensor(name: str, whole: Callable[[str], torch.Tensor | None]) -> torch.Tensor:
    if (value := whole(name)) is not None:
        return value
    return cast(torch.Tensor, whole(f"{name}t")).T.contiguous()
