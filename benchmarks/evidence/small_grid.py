"""Learning rates and seeds for AdaLoRA and LoRA on answers in passages and on questions of a language model.

    python benchmarks/evidence/small_grid.py --squad ../shared/data/squad_v1 --commonsense ../shared/data/commonsense
    python benchmarks/evidence/tables.py benchmarks/evidence/small_grid.jsonl

--squad has {train,validation}.jsonl, --commonsense TASK/{train,test}.jsonl of arc_easy, openbookqa and boolq. What is
fixed and chosen is in protocol.md. Every run is a line of a JSONL; those whose line is there are skipped.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from arms import GRID
from grid import SPLIT_SEED, Run, make, quietly_on_one_thread, trained
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoTokenizer

from adalora_dist.config.methods import MethodConfig
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.tasks.commonsense.choices import evaluate_choices
from adalora_dist.tasks.commonsense.config import CommonsenseDataConfig
from adalora_dist.tasks.commonsense.prompts import encode_examples
from adalora_dist.tasks.commonsense.rows import load_tasks
from adalora_dist.tasks.demo_models.minilm import demo_encoder_folder
from adalora_dist.tasks.demo_models.smollm2 import demo_model_folder
from adalora_dist.tasks.evaluation.loss import counts_of, validation_loss
from adalora_dist.tasks.evaluation.predict import predict
from adalora_dist.tasks.losses import LossSum, causal_loss, span_loss
from adalora_dist.tasks.rows.tokens import padding_token
from adalora_dist.tasks.squad.answers import find_answers
from adalora_dist.tasks.squad.config import SquadDataConfig
from adalora_dist.tasks.squad.rows import Question, load_squad, make_windows
from adalora_dist.tasks.squad.scores import score, windows_loss

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")

COMMONSENSE = ("arc_easy", "openbookqa", "boolq")
RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (1, 2, 3)
ARMS = {name: GRID[name] for name in ("adalora", "lora-4")}


class Sizes(NamedTuple):
    """What two cores can do."""

    steps: int
    batch: int
    max_length: int
    num_validation: int
    """Rows cut from the training rows; the learning rate is chosen on them."""
    num_dev: int
    """The first rows of the development set; the final scores are theirs."""


OF_SQUAD = Sizes(steps=60, batch=8, max_length=160, num_validation=80, num_dev=120)
OF_COMMONSENSE = Sizes(steps=16, batch=4, max_length=160, num_validation=32, num_dev=64)


class Job(NamedTuple):
    """A task, ready for any number of runs."""

    new_model: Callable[[], nn.Module]
    plan: Callable[[int], BatchPlan]
    """Of a seed."""
    loss_sum: LossSum
    scores: Callable[[nn.Module], dict[str, float]]
    steps: int
    arms: Mapping[str, MethodConfig]


def squad_job(source: str) -> Job:
    """Passages of the validation questions are in no training question."""
    sizes, folder = OF_SQUAD, demo_encoder_folder()
    data = SquadDataConfig(source=source, max_length=sizes.max_length, doc_stride=64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    padding = padding_token(tokenizer)
    train, dev = load_squad(data)
    passages = sorted({question.context for question in train})
    random.Random(SPLIT_SEED).shuffle(passages)
    order = {passage: index for index, passage in enumerate(passages)}
    train.sort(key=lambda question: order[question.context])
    validation = train[: sizes.num_validation]
    held_out = {question.context for question in validation}
    train = [question for question in train if question.context not in held_out]
    sets = {"validation": validation, "dev": dev[: sizes.num_dev]}
    windows = make_windows(train, tokenizer, data, "train", show_progress=False)
    checked = {name: make_windows(part, tokenizer, data, name, show_progress=False) for name, part in sets.items()}
    inputs, spans = [window.inputs for window in windows], [window.span for window in windows]

    def new_model() -> nn.Module:
        model: nn.Module = AutoModelForQuestionAnswering.from_pretrained(folder, num_labels=2, dtype=torch.float32)
        return model

    def scored(model: nn.Module, name: str, questions: list[Question]) -> dict[str, float]:
        names = ("start_logits", "end_logits")
        logits = predict(model, [window.inputs for window in checked[name]], padding, 32, outputs=names)
        answers = find_answers(questions, checked[name], logits, data.num_best, data.max_answer_length)
        result = score(data, questions, answers)
        return {f"{name} f1": result["f1"], f"{name} loss": windows_loss(checked[name], logits)}

    return Job(
        new_model,
        lambda seed: BatchPlan.of_inputs(inputs, spans, sizes.batch, seed),
        span_loss(inputs, spans, padding, CPU),
        lambda model: {k: v for name, part in sets.items() for k, v in scored(model, name, part).items()},
        sizes.steps,
        ARMS,
    )


def commonsense_job(source: str, task: str) -> Job:
    """Loss is that of the right reply's tokens, accuracy that of the most likely reply on the development rows."""
    sizes, folder = OF_COMMONSENSE, demo_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    padding = padding_token(tokenizer)
    train, tests = load_tasks(CommonsenseDataConfig(source=source, tasks=(task,)))
    dev = tests[task][: sizes.num_dev]
    known = {(example.instruction, example.input) for example in tests[task]}
    train = [example for example in train if (example.instruction, example.input) not in known]
    random.Random(SPLIT_SEED).shuffle(train)
    parts = {"validation": train[: sizes.num_validation], "dev": dev}
    rows = encode_examples(train[sizes.num_validation :], tokenizer, sizes.max_length, "output")
    checked = {name: encode_examples(part, tokenizer, sizes.max_length, "output") for name, part in parts.items()}

    def new_model() -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model

    def scores(model: nn.Module) -> dict[str, float]:
        losses = {
            f"{name} loss": validation_loss(model, causal_loss(part, padding, CPU), *counts_of(part), 8)["loss"]
            for name, part in checked.items()
        }
        found = evaluate_choices(model, tokenizer, dev, 8, sizes.max_length)
        return {**losses, "dev accuracy": found.num_correct / found.num_rows}

    return Job(
        new_model,
        lambda seed: BatchPlan.of_rows(rows, sizes.batch, seed),
        causal_loss(rows, padding, CPU),
        scores,
        sizes.steps,
        # SmolLM2's head is its embeddings: it stays as it is.
        {name: arm.model_copy(update={"train_modules": ()}) for name, arm in ARMS.items()},
    )


def one_run(run: Run, job: Job) -> dict[str, Any]:
    started = time.monotonic()
    set_seed(run.seed)  # a new head depends on the seed alone
    model = job.new_model()
    end = trained(model, job.arms[run.arm], job.plan(run.seed), job.loss_sum, run.rate, run.seed, job.steps)
    scores = {name: round(value, 4) for name, value in job.scores(model).items()}
    return {**run._asdict(), **scores, **end, "seconds": round(time.monotonic() - started, 1)}


def runs(tasks: Sequence[str]) -> Iterator[Run]:
    """Seed by seed."""
    for seed in SEEDS:
        for task in tasks:
            for rate in RATES:
                for arm in ARMS:
                    yield Run(task, arm, rate, seed)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", required=True)
    parser.add_argument("--commonsense", required=True)
    parser.add_argument("--tasks", nargs="+", choices=("squad", *COMMONSENSE), default=("squad", *COMMONSENSE))
    parser.add_argument("--output", type=Path, default=HERE / "small_grid.jsonl")
    args = parser.parse_args(arguments)
    quietly_on_one_thread()
    jobs: dict[str, Job] = {
        task: squad_job(args.squad) if task == "squad" else commonsense_job(args.commonsense, task)
        for task in args.tasks
    }
    make(runs(args.tasks), args.output, lambda run: one_run(run, jobs[run.task]))


if __name__ == "__main__":
    main()
