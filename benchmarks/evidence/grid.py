"""Learning rates and seeds for AdaLoRA and LoRA: MiniLM on four GLUE tasks, every run a line of a JSONL.

    python benchmarks/evidence/grid.py --data ../shared/data/glue

--data has TASK/{train,dev}.jsonl of cola, sst2, mrpc and rte. What is fixed, what is chosen and on which rows is in
protocol.md beside this file; tables.py prints the tables. Runs whose line is in --output are skipped, so the command
can be stopped at any time and given again. Lines come seed by seed: whatever is there is a grid over whole seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from arms import STUDIES
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from adalora_dist.config.methods import MethodConfig
from adalora_dist.config.sections import TrainConfig
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.parameter_budget import within_budget
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.tasks.demo_models.minilm import demo_encoder_folder
from adalora_dist.tasks.evaluation.predict import predict
from adalora_dist.tasks.glue.config import GlueDataConfig
from adalora_dist.tasks.glue.rows import TASKS, LabelledText, encode_texts, load_glue
from adalora_dist.tasks.glue.scores import score
from adalora_dist.tasks.losses import LossSum, classification_loss
from adalora_dist.training.prepared import learning_rate

HERE = Path(__file__).resolve().parent

TASK_NAMES = ("cola", "sst2", "mrpc", "rte")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (1, 2, 3, 4, 5)
STEPS = {"cola": 120, "sst2": 100, "mrpc": 50, "rte": 30}
MAX_LENGTH = 48
BATCH = 8
NUM_VALIDATION = 150
"""Rows cut from the training rows; the learning rate is chosen on them."""
NUM_DEV = 250
"""The first rows of the development set; the final scores are theirs."""
SPLIT_SEED = 2303
"""Of that cut, the same in every run."""


class Run(NamedTuple):
    """What identifies a run; the first fields of its line."""

    task: str
    arm: str
    rate: float
    seed: int


class Encoded(NamedTuple):
    """Rows of one set as the model takes them, with their class numbers."""

    inputs: list[dict[str, list[int]]]
    labels: list[float]


class TaskData(NamedTuple):
    train: Encoded
    validation: Encoded
    dev: Encoded
    padding_token: int


def load_task(name: str, source: str, tokenizer: Any) -> TaskData:
    """Training rows less those that the development set has too, cut into two; development rows."""
    train, sets = load_glue(GlueDataConfig(source=source, task=name))
    dev = sets["dev"][:NUM_DEV]
    known = {row.texts for row in sets["dev"]}
    train = [row for row in train if row.texts not in known]
    random.Random(SPLIT_SEED).shuffle(train)

    def encoded(rows: list[LabelledText]) -> Encoded:
        inputs = encode_texts(rows, tokenizer, MAX_LENGTH, name, show_progress=False)
        return Encoded(inputs, [row.label for row in rows])

    cut = NUM_VALIDATION
    return TaskData(encoded(train[cut:]), encoded(train[:cut]), encoded(dev), tokenizer.pad_token_id)


def new_model(folder: Path, num_labels: int, seed: int) -> nn.Module:
    """The encoder with a head that depends on the seed alone, so that arms of one seed start alike."""
    set_seed(seed)
    options: dict[str, Any] = {"num_labels": num_labels, "dtype": torch.float32}
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    return model


def trained(
    model: nn.Module, arm: MethodConfig, plan: BatchPlan, loss_sum: LossSum, rate: float, seed: int, num_steps: int
) -> dict[str, Any]:
    """Adapt and train it; the loop is the package's own on one process, with its clipping and schedule.

    Returns:
        The mean loss of the last ten steps, and how many triplets were pruned and came back.
    """
    config = within_budget(model, arm)
    adapt(model, config, seed)
    sizes = {"max_steps": num_steps, "batch_size": plan.batch_size, "micro_batch_size": plan.batch_size}
    settings = TrainConfig(learning_rate=rate, **sizes)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=settings.weight_decay, fused=True)
    hooks = attach(model, optimizer, config, num_steps)
    set_seed(seed)
    model.train()
    losses = []
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = learning_rate(settings, step, num_steps)
        loss = loss_sum(model, plan.batch(step)) / plan.num_target_tokens(step)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    hooks.finish()
    events = hooks.method_step.events(0)
    return {
        "train loss": round(sum(losses[-10:]) / 10, 4),
        "pruned": sum(event["pruned"] for event in events),
        "returned": sum(event["returned"] for event in events),
    }


def one_run(
    run: Run, arm: MethodConfig, data: TaskData, folder: Path, num_steps: int | None = None, batch_size: int = BATCH
) -> dict[str, Any]:
    """Train with the package's loss and batches, and score.

    Args:
        num_steps: default: the task's in ``STEPS``.
    """
    started = time.monotonic()
    task = TASKS[run.task]
    model = new_model(folder, task.num_labels, run.seed)
    plan = BatchPlan.of_inputs(data.train.inputs, [[label] for label in data.train.labels], batch_size, run.seed)
    loss_sum = classification_loss(
        data.train.inputs, data.train.labels, task.num_labels, data.padding_token, torch.device("cpu")
    )
    end = trained(model, arm, plan, loss_sum, run.rate, run.seed, num_steps or STEPS[run.task])
    scores: dict[str, float] = {}
    for name, rows in (("validation", data.validation), ("dev", data.dev)):
        predictions = predict(model, rows.inputs, data.padding_token, 32)
        logits, classes = torch.stack([row for (row,) in predictions]), torch.tensor(rows.labels).long()
        scores |= score(name, task, predictions, rows.labels)
        scores[f"{name} loss"] = nn.functional.cross_entropy(logits, classes).item()
    seconds = round(time.monotonic() - started, 1)
    return {**run._asdict(), **{name: round(value, 4) for name, value in scores.items()}, **end, "seconds": seconds}


def runs_of(args: argparse.Namespace) -> Iterator[Run]:
    """Seed by seed."""
    for seed in args.seeds:
        for task in args.tasks:
            for rate in args.rates:
                for arm in STUDIES[args.study]:
                    yield Run(task, arm, rate, seed)


def finished(output: Path) -> set[Run]:
    """The runs whose line is there. A half-written last line is cut off."""
    if not output.exists():
        return set()
    lines = output.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        output.write_text("".join(lines[:-1]), encoding="utf-8")
        lines.pop()
    return {Run(*(json.loads(line)[field] for field in Run._fields)) for line in lines}


def quietly_on_one_thread() -> None:
    """As all runs of these studies are made."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def make(runs: Iterable[Run], output: Path, one: Callable[[Run], dict[str, Any]]) -> None:
    """Every run whose line is not in ``output`` yet: its line is added and printed."""
    done = finished(output)
    for run in runs:
        if run not in done:
            record = one(run)
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            print(json.dumps(record), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, default=HERE / "grid.jsonl")
    parser.add_argument("--tasks", nargs="+", choices=TASK_NAMES, default=TASK_NAMES)
    parser.add_argument("--study", choices=STUDIES, default="grid", help="which arms (arms.py)")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, help="for all tasks; a study of its own, with its own --output")
    parser.add_argument("--batch", type=int, default=BATCH)
    args = parser.parse_args(arguments)
    quietly_on_one_thread()
    folder = demo_encoder_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = {name: load_task(name, args.data, tokenizer) for name in args.tasks}
    arms = STUDIES[args.study]
    make(
        runs_of(args),
        args.output,
        lambda run: one_run(run, arms[run.arm], data[run.task], folder, args.steps, args.batch),
    )


if __name__ == "__main__":
    main()
