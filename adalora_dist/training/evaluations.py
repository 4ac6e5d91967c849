"""Evaluations while a run trains: when they are made, which model was the best one, and when they end the run.

A model before the last selection has more triplets than its budget, so its scores are those of a model that nobody
gets: candidates for the best one are those from then on, and early stopping counts no evaluation before it.

The best model so far lies in ``best/step-N`` of the run folder, a checkpoint like any other. Every checkpoint of the
run says which one was the best at its step, and that one is kept for as long as the checkpoint is, so that a run that
continues from it chooses as the undisturbed run would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from adalora_dist.artifacts.checkpoints.content import Checkpoint, load_checkpoint
from adalora_dist.config.sections import EvaluationConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.protocol import trained_parameters
from adalora_dist.sharding.tensors import put_back_shards, release_gathered
from adalora_dist.training.best import Best
from adalora_dist.training.prepared import Prepared

PREFIX = "eval_"
"""Before the name of a score in metrics and trackers."""
Evaluate = Callable[[], Mapping[str, float]]


class Evaluations:
    """The evaluations of one run.

    Args:
        settings: the ``evaluation`` section.
        num_steps: of the whole run.
        evaluate: the scores of the model as it is; called on all processes together. None: the recipe has none.

    Raises:
        UserError: the settings ask for evaluations that the recipe does not have, that no step is left for, or that
            would choose by another score than the part of the run before.
    """

    def __init__(
        self, prepared: Prepared, settings: EvaluationConfig, num_steps: int, evaluate: Evaluate | None
    ) -> None:
        self._prepared, self._settings, self._num_steps = prepared, settings, num_steps
        if settings.eval_every and evaluate is None:
            raise UserError(
                f"eval_every={settings.eval_every}: there are no rows, or no scores, to evaluate on while training; "
                "leave it out"
            )
        self._evaluate = evaluate
        self.best = self._best_before(prepared.resumed)
        self._refuse_too_few()

    def _best_before(self, resumed: Checkpoint | None) -> Best | None:
        metric = self._settings.keep_best
        if resumed is None or not metric or resumed.run.get("best") is None:
            return None
        best = Best.model_validate(resumed.run["best"])
        if best.metric != metric:
            raise UserError(
                f"keep_best={metric}, but up to {resumed.path} the best model was chosen by {best.metric}: set it "
                "back, or start anew in another --output-dir with --resume never"
            )
        return best

    def _refuse_too_few(self) -> None:
        """Early stopping that could not act, with the reason."""
        every, patience = self._settings.eval_every, self._settings.early_stopping
        if not patience:
            return
        schedule = self._prepared.hooks.method_step.schedule
        first = 1 if schedule is None else schedule.freeze_step + 1
        count = sum(self.due(step) for step in range(first, self._num_steps + 1))
        if count <= patience:
            why = "" if schedule is None else f" (before step {first} the model is over its budget, and no candidate)"
            raise UserError(
                f"early_stopping={patience} with eval_every={every}: {count} evaluations fall into steps {first} to "
                f"{self._num_steps}{why}, too few to stop after; lower eval_every or early_stopping, or raise "
                f"{'max_steps or epochs' if schedule is None else 'final_steps'}"
            )

    def check_name(self) -> None:
        """Evaluate once, before the first step, so that a score that does not exist is an error now. Collective.

        Raises:
            UserError: ``keep_best`` is the name of none; it lists them.
        """
        metric = self._settings.keep_best
        if metric and self.best is None:
            self._choose(self._measure(), metric)

    def due(self, num_done: int) -> bool:
        """Whether to evaluate after ``num_done`` steps.

        After the last step the recipe does so by itself; but where the best model is kept, the last one is a candidate.
        """
        every = self._settings.eval_every
        if not every:
            return False
        if num_done == self._num_steps:
            return bool(self._settings.keep_best)
        return num_done % every == 0

    def after(self, num_done: int) -> dict[str, float]:
        """The scores after ``num_done`` steps, by the names that logs have; none is due: {}. Collective."""
        if not self.due(num_done):
            return {}
        scores = self._measure()
        return {f"{PREFIX}{name}": score for name, score in scores.items()}

    def _measure(self) -> Mapping[str, float]:
        assert self._evaluate is not None
        scores = self._evaluate()
        put_back_shards(self._prepared.model)
        return scores

    def improved(self, num_done: int, scores: Mapping[str, float]) -> bool:
        """Note what :meth:`after` has found; whether this is the best model so far, which is to be kept."""
        metric = self._settings.keep_best
        if not metric or not scores or self._prepared.hooks.problem() is not None:
            return False
        score = self._choose({name.removeprefix(PREFIX): value for name, value in scores.items()}, metric)
        if self.best is None and not math.isfinite(score):
            return False
        if self.best is None or self.best.is_beaten_by(score):
            self.best = Best(metric=metric, score=score, step=num_done, num_since=0)
            return True
        self.best = self.best.model_copy(update={"num_since": self.best.num_since + 1})
        return False

    @staticmethod
    def _choose(scores: Mapping[str, float], metric: str) -> float:
        if metric not in scores:
            raise UserError(f"keep_best={metric}: evaluations have no such score; legal: {', '.join(scores)}")
        return scores[metric]

    @property
    def ended(self) -> bool:
        """Whether early stopping ends the run here."""
        patience = self._settings.early_stopping
        return bool(patience) and self.best is not None and self.best.num_since >= patience

    @property
    def record(self) -> dict[str, Any] | None:
        """The best model so far, for checkpoints and ``best.json``."""
        return None if self.best is None else self.best.model_dump()

    def sentence(self, num_done: int) -> str:
        """Which model of a run that has made ``num_done`` steps it leaves; "" if nobody has asked for the best one."""
        metric = self._settings.keep_best
        if self.best is None:
            return f"Best model: no evaluation had a finite {metric}; the last model is exported" if metric else ""
        best, stopped = self.best, ""
        if self.ended and num_done < self._num_steps:
            stopped = f"Stopped early after step {num_done} of {self._num_steps}: {best.num_since} evaluations without "
            stopped += f"a better {best.metric}\n"
        return f"{stopped}Best model: that of step {best.step} ({best.metric} {best.score:.4f}); it is the one exported"

    def restore(self, checkpoint: Checkpoint) -> None:
        """Make the best model the one that the run has. Collective."""
        prepared = self._prepared
        release_gathered(prepared.model)
        prepared.parameters = trained_parameters(prepared.model)
        load_checkpoint(checkpoint, prepared.parameters, prepared.optimizer, prepared.hooks)
