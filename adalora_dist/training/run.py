"""The chapters of a run that all recipes share, as verbs. A recipe calls them in its own order and writes the rest.

    run = Run(config)                     refuse what cannot work, start the engine
    run.begin()                           seed; find the checkpoint to continue from
    run.demo_data(...)                    built-in data, and rows, if the user gave none
    run.demo_model(...)                   the same of the model
    tokenizer = run.load_model(...)
    run.prepare(plan)                     adapters into the model, the model under its engine, the run folder
    columns = run.notes                   what was found before training, if the run is continued
    run.train(loss_sum, columns)
    run.export(tokenizer)
    run.finish(table)                     what it has come to
    run.close()                           end the engine; push

Nothing here calls back into a recipe later, and nothing is to be overridden: what a verb does not do as wanted is
written out in the recipe, from ``run.accelerator``, ``run.prepared`` and the functions that the verb calls.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adalora_dist.artifacts.checkpoints.content import Checkpoint
from adalora_dist.artifacts.hub.push import check_push_of_run, push_run
from adalora_dist.backbones.fit import Reply, check_lengths, check_room, lengths_of
from adalora_dist.backbones.load import load_backbone
from adalora_dist.backbones.quantization import quantization_of
from adalora_dist.config.formats import ADAPTER_FORMATS
from adalora_dist.config.merging import check_merging_engine
from adalora_dist.config.sections import RunConfig
from adalora_dist.io.redaction import redacted
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.parameter_budget import fit, positions_taken
from adalora_dist.sharding.tensors import put_back_shards
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.tasks.losses import LossSum
from adalora_dist.tasks.packing import decide as decide_packing
from adalora_dist.tasks.packing import is_flat, with_packing
from adalora_dist.tasks.padding import unwrapped
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.training.engine import build_accelerator, engine_name, start_trackers, with_precision
from adalora_dist.training.evaluations import Evaluate
from adalora_dist.training.faults.guard import Guard
from adalora_dist.training.finish import export_trained
from adalora_dist.training.loop import generates_together, train
from adalora_dist.training.prepared import Prepared, check_budget, prepare, total_steps
from adalora_dist.training.report import facts_line, rank_report, run_facts
from adalora_dist.training.restarts import count_restart
from adalora_dist.training.resume import compare_data, find_checkpoint
from adalora_dist.training.run_folder import RunFolder, refuse_used_folder
from adalora_dist.training.trials import try_forwards
from adalora_dist.training.verify import Probe, last_logits, load_plainly, logit_differences

Config = TypeVar("Config", bound=RunConfig)


class Run(Generic[Config]):
    """One run of a recipe, on every process of it. Verbs are collective: all processes call them in the same order.

    Raises:
        UserError: what the configuration asks for cannot work here: the folder holds a run, the Hub takes no push,
            the launcher did not start what it promised, quantisation and engine do not go together.
    """

    def __init__(self, config: Config) -> None:
        config = with_precision(config)
        refuse_used_folder(config)
        check_push_of_run(config)
        self.config = config
        """With what :meth:`demo_data` and :meth:`demo_model` put in the place of empty names."""
        self.accelerator = accelerator = build_accelerator(config.train)
        self.guard = Guard(accelerator, config)
        self.engine = engine_name(accelerator)
        check_merging_engine(config.evaluation, self.engine)
        self.quantization = quantization_of(config, self.engine)
        self.bad_rows = BadRows(cast(Any, config).data.bad_rows)
        self.is_main, self.device = accelerator.is_main_process, accelerator.device
        self.ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        """For evaluations, which are dealt out over processes."""
        self.resumed: Checkpoint | None = None
        self.scores: Mapping[str, float] = {}
        """At the end, for the mean over seeds."""
        self._loaded: PreTrainedModel | None = None
        self._num_taken = 0  # of the model's positions, by a prefix
        self._prepared: Prepared | None = None

    def say(self, line: str) -> None:
        """Print on the main process alone, without secrets; an empty line is none."""
        if line:
            self.accelerator.print(redacted(line))

    def begin(self) -> None:
        """Seed everything, and find the checkpoint that ``resume`` asks for.

        Raises:
            UserError: as :func:`adalora_dist.training.resume.find_checkpoint`, or of
                :func:`adalora_dist.training.restarts.count_restart`.
        """
        set_seed(self.config.train.seed)
        self.resumed = find_checkpoint(self.config)
        count_restart(self.config.train, 0 if self.resumed is None else self.resumed.step)
        if self.resumed is not None:
            self.say(f"Continuing after step {self.resumed.step} from {self.resumed.path}")

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The main process does what is in it, then one of each other node, then all, who find that in the cache."""
        with self.accelerator.main_process_first(), self.accelerator.local_main_process_first():
            yield

    # ------------------------------------------------------------------------------------------------ data and model

    def demo_data(self, what: str, own: str, folder: Callable[[], Path] | None = None) -> None:
        """Say that the data is built in, and how to bring one's own. Does nothing where the user has given some.

        Args:
            own: flags, for the sentence "Your own: ...".
            folder: writes the built-in data, which then is ``data.source``; None: an empty source is read as built in.
        """
        data = cast(Any, self.config).data
        if data.source:
            return
        if folder is not None:
            with self.main_process_first():
                source = str(folder())
            what += f" ({source})"
            self.config = self.config.model_copy(update={"data": data.model_copy(update={"source": source})})
        self.say(f"Data: {what}. Your own: {own}.")

    def demo_model(self, what: str, folder: Callable[[Callable[[str], None]], Path]) -> None:
        """Name the recipe's demonstration model where the user has named none, and say so.

        Args:
            folder: makes the model, once; is given :attr:`say`.
        """
        if self.config.model.name:
            return
        with self.main_process_first():
            name = str(folder(self.say))
        self.say(f"Model: {what}. Your own: --model FOLDER_OR_HUB_ID.")
        self.config = self.config.model_copy(update={"model": self.config.model.model_copy(update={"name": name})})

    def report_bad_rows(self) -> None:
        """One line, if any row has been left out."""
        if summary := self.bad_rows.summary():
            self.say(summary)

    def say_sizes(self, sizes: str, validation: Sized | None) -> None:
        """How many rows there are: ``sizes``, and those to evaluate on while training, if that is to be."""
        self.say(f"{sizes}; while training: {len(validation or ())}" if self.validates else sizes)

    def load_model(self, auto_class: Any, changes: Mapping[str, Any] | None = None) -> PreTrainedTokenizerBase:
        """The backbone, as :attr:`model`, and its tokenizer. Arguments as of ``load_backbone``.

        Raises:
            UserError: as of ``load_backbone``, or the model has fewer positions than the run's longest sequences.
        """
        self._auto_class = auto_class
        self._loaded, tokenizer = load_backbone(self.config.model, auto_class, self.quantization, changes)
        self._num_taken = positions_taken(self._loaded, self.config.adapter)
        check_lengths(self._loaded, lengths_of(self.config), self._num_taken)
        return tokenizer

    def check_replies(self, prompts: Sequence[Sequence[int]], setting: str = "max_new_tokens", count: int = 1) -> None:
        """Compare prompts of the evaluation (token ids), and ``count`` replies, one in each turn, of so many tokens as
        its ``setting`` says, with the model's positions. None there keeps within ``max_length``.

        Raises:
            UserError: the longest does not fit.
        """
        if (tokens := getattr(self.config.evaluation, setting)) is not None:
            reply = Reply(setting, tokens, count)
            check_room(self.model, max(map(len, prompts), default=0), reply, self._num_taken)

    @property
    def model(self) -> PreTrainedModel:
        """The model itself, out of what the engine has wrapped it in."""
        model = self._loaded if self._prepared is None else unwrapped(self._prepared.model)
        assert model is not None, "load_model() comes first"
        return model

    # ------------------------------------------------------------------------------------------------------ training

    @property
    def batching(self) -> tuple[int, int, bool]:
        """The last arguments of a ``BatchPlan``: batch_size, seed, group_by_length."""
        train = self.config.train
        return train.batch_size, train.seed, train.group_by_length

    def prepare(self, plan: BatchPlan) -> None:
        """Adapters into the model, the model under its engine, the run folder and the trackers; one line of facts.

        Raises:
            UserError: adapters, schedule or checkpoint do not fit the model, the run continued had other rows, a row
                is longer than ``micro_batch_tokens``, the folder cannot be written, a language model reads both ways.
        """
        accelerator, config = self.accelerator, self.config
        check_budget(plan, config.train)
        if self.resumed is not None:  # before the folder is made, which changes what is in it
            compare_data(self.resumed, plan, config)
        model, num_steps = self.model, total_steps(config.train, plan)
        fitted = fit(model, config.adapter)
        sized = config if fitted is None else config.model_copy(update={"adapter": fitted.config})
        adapt(model, sized.adapter, config.train.seed)
        prepared = prepare(accelerator, model, sized, num_steps, self.resumed)
        try_forwards(prepared.model, config.train, self._auto_class, accelerator.mixed_precision == "no")
        facts = run_facts(config, self.engine, accelerator.num_processes, num_steps, prepared, self.bad_rows)
        if fitted is not None:
            self.say(f"Budget: {fitted.as_sentence()}")
            facts |= {"parameter_budget": fitted.as_record()}
        self.folder = RunFolder(config, self.is_main, facts, self.resumed)
        start_trackers(accelerator, config)
        self.say(facts_line(facts, prepared.hooks.method_step.plan()))
        self._prepared, self._plan = prepared, plan

    @property
    def prepared(self) -> Prepared:
        assert self._prepared is not None, "prepare() comes first"
        return self._prepared

    def generates_together(self) -> bool:
        """As :func:`adalora_dist.training.loop.generates_together`."""
        return generates_together(self.accelerator, self.prepared.model, self.config.evaluation)

    def packs(self, padding_token: int) -> bool:
        """Whether rows share sequences, as ``train.packing`` asks; says what is saved. Collective.

        Raises:
            UserError: it is on, and the model cannot.
        """
        train = cast(Any, self.config).train
        world_size = self.accelerator.num_processes
        decided = decide_packing(self.model, self._plan, train, world_size, padding_token, self.say)
        put_back_shards(self.prepared.model)
        if decided:
            self._plan = with_packing(self._plan, is_flat(self.model))
        return decided

    @property
    def notes(self) -> dict[str, Any]:
        """Of a run that is continued, the notes that :meth:`train` was given; of a new one, {}."""
        return {} if self.resumed is None else self.resumed.run["notes"]

    @property
    def evaluates_before(self) -> bool:
        """Whether to evaluate before training; a run that is continued has that in its notes."""
        return self.resumed is None and self.config.evaluation.evaluate_before

    def train(self, loss_sum: LossSum, notes: Mapping[str, Any], evaluate: Evaluate | None = None) -> None:
        """All steps that are left. Errors as of :func:`adalora_dist.training.loop.train`.

        Args:
            notes: JSON that checkpoints shall keep, for :attr:`notes` of a run that continues from one.
            evaluate: called on all processes every ``evaluation.eval_every`` steps; its scores are logged, and
                ``evaluation.keep_best`` chooses by them.
        """
        train(
            self.accelerator, self.prepared, self._plan, loss_sum, self.config, self.folder, self.say, self.guard,
            notes, evaluate,
        )  # fmt: skip

    @property
    def validates(self) -> bool:
        """Whether evaluations are to be made while training."""
        return self.config.evaluation.eval_every > 0

    # ------------------------------------------------------------------------------------------------- what is left

    def export(
        self, tokenizer: PreTrainedTokenizerBase, probe: Probe | None = None, num_last: int = 0, what: str = ""
    ) -> None:
        """Write the adapter and ``export_formats``; with a probe, compare the merged model's logits, if asked for.

        Args:
            probe: a sequence, of which the logits of the ``num_last`` last tokens are compared.
            what: it is, for the sentence on the console.
        """
        logits = None
        if probe is not None and self.config.export.verifies_merged:
            # On every process: where the model is sharded, forwards are collective.
            logits = last_logits(self.model, probe, num_last, self.device)
        self._pattern = export_trained(self.accelerator, self.prepared, self.config, tokenizer, self.folder)
        if probe is not None and logits is not None and self.is_main:
            difference = logit_differences(self._auto_class, self.folder.path / "merged", probe, logits)
            self.folder.write_json("verification.json", difference.as_record(logits))
            self.say(difference.as_sentence(what, logits))

    @property
    def verifies_here(self) -> bool:
        """Whether this process is to compare the merged model with the trained one, where :meth:`export` has not."""
        return self.is_main and self.config.export.verifies_merged

    def merged_model(self) -> nn.Module:
        """The exported model on the CPU, as plain transformers loads it; for the process that verifies."""
        return load_plainly(self._auto_class, self.folder.path / "merged")

    def report_difference(self, largest: float) -> None:
        """Of the merged model's logits from the trained model's, wherever they were compared."""
        self.folder.write_json("verification.json", {"largest_logit_difference": largest})
        self.say(f"Merged model in plain transformers: logits differ from the trained model's by up to {largest:.1e}")

    def finish(self, table: str, scores: Mapping[str, float] | None = None) -> None:
        """Print what the run has come to, the ranks, and the folder's files.

        Args:
            scores: at the end, for the mean over seeds.
        """
        self.scores = scores or {}
        self.accelerator.wait_for_everyone()
        self.say("\n" + table)
        self.say(rank_report(self.prepared, self._pattern))
        self.say(self.folder.listing())
        path = shlex.quote(str(self.folder.path))
        forms = [form for form in ADAPTER_FORMATS if form in self.config.adapter.formats]
        export = f", export {path} --to {forms[0]}" if forms else ""
        push = ", or push" if "merged" in self.config.adapter.formats else ""
        self.say(f"Next: adalora-dist report {path} (curves and ranks in one page){export}{push}")

    def with_seed(self, seed: int) -> Run[Config]:
        """A run of its own on the same engine and data, in a folder of its own."""
        train = self.config.train
        own = {"seed": seed, "seeds": (), "output_dir": f"{train.output_dir}/seed_{seed}"}
        run = copy.copy(self)
        run.config = self.config.model_copy(update={"train": train.model_copy(update=own)})
        return run

    def free(self) -> None:
        """Give back the memory of the model and of what trains it."""
        self._loaded = self._prepared = None
        self.accelerator.free_memory()

    def close(self) -> None:
        """End trackers, process group and guard; push the run, if it is to be.

        Raises:
            UserError: as :func:`adalora_dist.artifacts.hub.push.push`.
        """
        self.accelerator.end_training()
        self.guard.close()
        if self.is_main:  # no process group is left that could wait for the network
            push_run(self.config)
