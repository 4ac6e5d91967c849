"""``attach``: a method, hung onto an optimizer once, for any training loop on any engine.

What every method needs lives here and not in any of them: the hooks of the innermost optimizer's step, where gradients
are reduced, unscaled and clipped on every engine; the count of its firings; the guard against gradients that are not
finite; the count of steps that an engine has left out; the look whether adapters take part; the complaint at exit.

A step with a non-finite gradient anywhere is left out on all ranks, by the optimizer and by the method together, as one
NaN would poison weights and averages for ever. It is left out on the device, where the optimizer can look at a flag
there, and the host waits for nothing. (Others cost one read per step; see docs/sharding.md.)

Communication beyond the engine's own: one float32 sum per step over the shard group (nothing on one process or under
DDP) of [what the method sums | number of non-finite gradients].
"""

from __future__ import annotations

import atexit
import logging
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from adalora_dist.config.methods import MethodConfig
from adalora_dist.io.ending import has_failed
from adalora_dist.io.errors import UserError
from adalora_dist.methods import method_for
from adalora_dist.methods.first_step import FirstStep
from adalora_dist.methods.packing import check_packed
from adalora_dist.methods.protocol import (
    Adapter,
    Method,
    Step,
    StepState,
    adapters_of,
    carries_peft,
    trained_parameters,
)
from adalora_dist.methods.updates import Updates, gather_trained
from adalora_dist.sharding import select_engine
from adalora_dist.sharding.agreement import this_rank
from adalora_dist.sharding.base import ShardEngine, sum_over
from adalora_dist.sharding.zero_leaves import ask_for_input_gradients

logger = logging.getLogger(__name__)


class Bound:
    """A step's parameters under the engine that has taken them over, and the vector that is summed in every step."""

    def __init__(self, step: Step, model: nn.Module, optimizer: Any) -> None:
        parameters = step.parameters() or trained_parameters(model)
        self.engine: ShardEngine = select_engine(list(parameters.values()), optimizer)
        self.partials = step.bind(self.engine)
        self.skip = self.partials[-1]
        """float32 scalar: 1 where this step has a non-finite gradient somewhere, else 0."""


class MethodHooks:
    """One method at work on one optimizer, from :func:`attach`. The training loop needs no further call but two.

    :meth:`catch_up` after each of its steps, where the engine may leave steps out (fp16), and :meth:`finish` at the
    end, which raises if the run did not reach what it promised.
    """

    def __init__(self, model: nn.Module, method: Method, method_step: Step) -> None:
        self.model, self.method, self.method_step = model, method, method_step
        self.step = 0
        """Training steps seen so far; the number of the next one."""
        self._bound: Bound | None = None
        self._firing = 0  # of the present step, those that are done
        self._rates: list[tuple[dict[str, Any], Any]] = []  # of groups whose rate the method has changed for a firing
        self._num_missed = 0  # steps that the engine left out by itself
        self._num_skipped: torch.Tensor | None = None  # those left out here, counted on the device
        self._ended = False
        self._first_step: FirstStep | None = FirstStep(model, method_step.adapters)
        self._said = ""  # of the first step, until a loop asks for it
        self._is_logged = False  # as one that does not ask begins its second step
        method_step.begin(0)

    # ------------------------------------------------------------------ the step, seen from the optimizer's hooks

    @torch.no_grad()
    def before_firing(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer is about to fire; a step hook of it."""
        bound = self.bind(optimizer)
        if getattr(optimizer, "grad_scale", None) is not None:
            raise UserError(
                f"{type(optimizer).__name__}(fused=True) unscales fp16 gradients inside its step, after this hook: "
                "with fp16 use fused=False (Trainer: optim='adamw_torch')"
            )
        if self._first_step is not None:
            self._said, self._first_step = self._first_step.end(), None
        elif self._said and not self._is_logged:  # by a loop that does not ask: Trainer's, or one's own
            self._is_logged = True
            if this_rank() == 0:
                logger.warning("%s", self._said)
        if self._firing == 0:
            self._begin(bound)
        if (factor := self.method_step.rate_factor(self.step)) != 1:
            self._rates = [(group, group["lr"]) for group in optimizer.param_groups]  # ZeRO: of this firing alone
            for group, rate in self._rates:
                group["lr"] = rate * factor
        self.method_step.before(self._firing == bound.engine.num_firings - 1)
        bound.engine.skip_firing_if(bound.skip)

    @torch.no_grad()
    def after_firing(self) -> None:
        """The optimizer has fired; a step hook of it."""
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []
        self._firing += 1
        if self._firing < self.bound.engine.num_firings:
            return
        self._firing = 0
        self.method_step.after(self.step)
        self.step += 1
        self.method_step.begin(self.step)

    def _begin(self, bound: Bound) -> None:
        """What the method sums, and whether all gradients of the step are finite, agreed over the shard group."""
        self.method_step.sums(self.step)
        bound.skip.copy_(bound.engine.nonfinite())
        reduced = sum_over(bound.engine.shard_group, bound.partials)
        if reduced is not bound.partials:
            bound.partials.copy_(reduced)
        bound.skip.clamp_(max=1)
        self._num_skipped = bound.skip.clone() if self._num_skipped is None else self._num_skipped.add_(bound.skip)
        self.method_step.summed()

    # ------------------------------------------------------------------------------------------ what loops ask

    def bind(self, optimizer: Any) -> Bound:
        """Find out which spans of the parameters this rank holds, once the engine has taken them over. Collective.

        The first step does so by itself; a second call changes nothing.

        Args:
            optimizer: as the engine wraps it.
        """
        if self._bound is None:
            self._bound = Bound(self.method_step, self.model, optimizer)
        return self._bound

    def start(self, model: nn.Module, optimizer: Any, tokens: Sequence[int]) -> None:
        """Begin from a text, where the settings have one (``start_text``), before the first step. Collective.

        Args:
            model: as the engine wraps it.
            optimizer: likewise.
            tokens: of the text.

        Raises:
            UserError: they are fewer than are needed.
        """
        self.method_step.start(self.bind(optimizer).engine, model, tokens)

    def rebind(self, optimizer: Any) -> None:
        """Go on with the parameters that the model has now, after they were exchanged. Collective."""
        self.engine.retire()
        self._bound = Bound(self.method_step, self.model, optimizer)

    @property
    def bound(self) -> Bound:
        """What :meth:`bind` saw.

        Raises:
            RuntimeError: no step has been made, so it is not known yet.
        """
        if self._bound is None:
            raise RuntimeError("the adapters can be gathered after the first optimizer step, not before")
        return self._bound

    @property
    def engine(self) -> ShardEngine:
        """What says which spans of the parameters this rank holds.

        Raises:
            RuntimeError: no step has been made, so it is not known yet.
        """
        return self.bound.engine

    def notices(self, step: int, learning_rate: Callable[[int], float]) -> list[str]:
        """Lines for the console after ``step``. Collective; arguments as of :meth:`Step.notice`."""
        lines = [self._said, self.method_step.notice(step, learning_rate)]
        self._said = ""
        return [line for line in lines if line]

    def watch_no_longer(self) -> None:
        """Of a run that is continued: whether adapters take part was seen in its first step."""
        if self._first_step is not None:
            self._first_step.leave()
            self._first_step = None

    def replace(self, model: nn.Module, optimizer: Any) -> str:
        """Between two steps: exchange parameters if the method is due to; in a few words what was done. Collective.

        Args:
            model: as the engine wraps it.
            optimizer: the torch optimizer, or any wrapper of it.
        """
        return self.method_step.replaces(self, model, optimizer)

    def catch_up(self, num_steps: int) -> None:
        """Move the method's schedule on to ``num_steps`` finished steps, as the loop counts them.

        Engines that skip a step with an overflow never call the optimizer, so the schedule would fall behind.

        Raises:
            RuntimeError: no step at all has reached the hooks: they hang on another optimizer than is stepped.
        """
        if self._bound is None and num_steps > 32:
            raise RuntimeError(
                f"{num_steps} training steps were counted, but the optimizer given to attach was never stepped: attach "
                "to the optimizer that the loop (or engine) uses"
            )
        for missed in range(self.step, num_steps):
            self.method_step.missed(missed)
            self._num_missed += 1
            self.step = missed + 1
            self.method_step.begin(self.step)

    @property
    def num_skipped_steps(self) -> int:
        """Steps left out because a gradient somewhere was not finite. Reads from the device."""
        return self._num_missed + (0 if self._num_skipped is None else int(self._num_skipped))

    @property
    def bytes_per_step(self) -> int:
        """What this rank puts into the sum of every step; 0 where nothing is sharded. Known after the first step."""
        if self._bound is None or self._bound.engine.shard_group is None:
            return 0
        return self._bound.partials.nbytes

    def rank_pattern(self) -> dict[str, int]:
        """Active rank of each adapted matrix, by name. Reads from the device."""
        return self.method_step.rank_pattern()

    def updates(self) -> Updates:
        """What each adapted matrix has become, and, on the main process, what was trained besides. Collective.

        Raises:
            RuntimeError: no step has been made, so it is not known yet how the parameters are sharded.
        """
        adapters = self.method_step.adapters
        if not adapters:
            return Updates([], gather_trained(self.model), self.model)
        engine, index = self.engine, {name: k for k, name in enumerate(self.method_step.parameters())}

        def whole(name: str) -> torch.Tensor | None:
            return engine.full(index[name]).cpu() if name in index else self.method_step.whole(name)

        keep = self.method_step.keep
        updates = self.method.updates(
            {adapter.name: adapter.description() for adapter in adapters},
            {adapter.name: adapter.held() for adapter in adapters},
            None if keep is None else keep.cpu(),
            whole,
        )
        return Updates(updates, gather_trained(self.model), self.model)

    # ------------------------------------------------------------------------------------ what a checkpoint holds

    def state(self) -> StepState:
        """A copy of all that was learnt, on the CPU, between two steps. :meth:`bind` comes first.

        Raises:
            RuntimeError: ranks do not agree: such a state must not be kept.
        """
        state = self.method_step.state(self.engine.spans())
        own = {"step": self.step, "num_skipped_steps": self.num_skipped_steps}
        return state._replace(numbers=own | state.numbers)

    def load_state(self, state: StepState) -> None:
        """Continue from ``state``, whose averages are of this rank's spans now. :meth:`bind` comes first."""
        self.step, self._num_missed = state.numbers["step"], state.numbers["num_skipped_steps"]
        self._num_skipped = None
        self.method_step.load_state(state)
        self.method_step.begin(self.step)

    # ------------------------------------------------------------------------------------------ the end of a run

    def finish(self) -> None:
        """End of the run: make sure that it reached what it promised, alike on all ranks. Collective.

        Ask before anything is published.

        Raises:
            RuntimeError: it did not, with the likely cause, or ranks differ.
        """
        self._ended = True
        if problem := self.problem():
            raise RuntimeError(problem)
        self.method_step.check()

    def problem(self) -> str | None:
        """Why the run, if it ended now, would not have reached what it promised; None if it has."""
        if self._bound is None:
            return "the method was never called: the optimizer given to attach was not stepped"
        return self.method_step.problem(self.step)

    def detach(self) -> None:
        """The run was given up on purpose: no complaint at exit."""
        self._ended = True

    def complain(self) -> None:
        """At exit, for plain loops that never ask :meth:`finish`; not after an error, which is the cause."""
        if not self._ended and not has_failed() and (problem := self.problem()):
            print(f"warning: adalora_dist: {problem}", file=sys.stderr)


def attach(model: nn.Module, optimizer: Any, config: MethodConfig, total_steps: int) -> MethodHooks:
    """Hang the method that ``config`` asks for onto ``optimizer``.

    Args:
        model: as :func:`~adalora_dist.methods.adapt` left it; may be wrapped already.
        optimizer: a torch optimizer, or anything that wraps one as ``.optimizer`` (accelerate, DeepSpeed, an engine
            of theirs). It must update what the method trains.
        config: the ``adapter`` section.
        total_steps: optimizer steps of the whole run, T.

    Raises:
        UserError: no adapters in a model whose method has some, or settings that do not fit ``total_steps``.
    """
    method = method_for(config)
    adapters: list[Adapter] = adapters_of(model)
    if config.has_adapters and not adapters:
        missing = "convert_peft(model), as it has PEFT's" if carries_peft(model) else "adapt(model, config)"
        raise UserError(f"the model has no adapters: call {missing} before attach")
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    method.check_optimizer(model, optimizer)
    check_packed(adapters, optimizer)
    method_step = method.step(adapters, total_steps)
    method_step.look_at(model)
    hooks = MethodHooks(model, method, method_step)
    ask_for_input_gradients(model)
    optimizer.register_step_pre_hook(lambda opt, *_: hooks.before_firing(opt))
    optimizer.register_step_post_hook(lambda *_: hooks.after_firing())
    atexit.register(_complain_at_exit, weakref.ref(hooks))
    return hooks


def _complain_at_exit(reference: weakref.ref[MethodHooks]) -> None:
    if (hooks := reference()) is not None:
        hooks.complain()
