"""What a step, an evaluation and a start cost besides the method, before and after, counted in one run on any machine.

    python benchmarks/table.py            prints the table; about eight minutes on one CPU core

"Before" is what is done without the part in question: with a mask, with ``nn.Dropout``, with all logits at once, a
sequence for each choice, a question at a time, an engine's parameter for every factor, a checkpoint in the loop.
Operations, host reads, bytes and tokens are counted; seconds are of the process's CPU time, but for the checkpoint's.
"""

from __future__ import annotations

import copy
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from operations import NUM_LAYERS, Counts, count_run, of_engine
from torch import nn
from variants import Variant, llama

from adalora_dist.artifacts.checkpoints.writer import CheckpointWriter
from adalora_dist.backbones.activations import checkpoint_activations
from adalora_dist.backbones.merging import merged
from adalora_dist.config.activations import ActivationsConfig
from adalora_dist.methods.adalora import bound, layers, products
from adalora_dist.methods.dropout import Dropout
from adalora_dist.methods.protocol import trained_parameters
from adalora_dist.tasks.batches import BatchPlan, collate
from adalora_dist.tasks.commonsense.choices import evaluate_choices
from adalora_dist.tasks.commonsense.prompts import choice_tokens, encode_example, encode_examples, prompt_tokens
from adalora_dist.tasks.commonsense.rows import Example
from adalora_dist.tasks.token_losses import TokenLosses, automatic_chunk, logits_bytes

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.kept import kept_bytes
from tests.support.memory import peak_bytes
from tests.support.ranks import run_ranks
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama, word_tokenizer

NUM_QUESTIONS = 148_000  # rows of the eight commonsense tasks
SCHEDULE = (100, 1, 1, 10)


class WithMask(nn.Dropout):
    """Dropout that keeps its mask, and the product a copy."""

    def product(self, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        dropped: torch.Tensor = self(x)
        return dropped.to(dtype) @ weight.to(dtype)


def rows() -> Iterator[tuple[str, str, str]]:
    """(what, before, after)."""
    yield from masks()
    yield from dropout()
    yield from logits()
    yield from evaluation()
    yield from decoding()
    yield from micro_batches()
    yield from checkpointing()
    yield from state()
    yield from engines()
    yield from checkpoints()
    yield from start()


def masks() -> Iterator[tuple[str, str, str]]:
    model = llama(16, 44, 4)
    batch = collate([{"input_ids": [3] * n, "labels": [3] * n} for n in (9, 5)], 0)
    found = {}
    for name, inputs in {
        "masked": {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]},
        "bare": {"input_ids": batch["input_ids"]},
    }.items():
        counts = found[name] = Counts()
        with counts.with_host_reads():
            model(**inputs)
    more = found["masked"].aten.total() - found["bare"].aten.total()
    reads = found["masked"].host_reads["__bool__"]
    yield "mask of right-padded rows, operations a forward", str(more), "0"
    yield "the same, host reads", str(reads), str(found["bare"].host_reads.total())


def dropout() -> Iterator[tuple[str, str, str]]:
    def kept(kind: type, p: float) -> int:
        with mock.patch.object(layers, "Dropout", kind):
            model = llama(64, 176, 4).bfloat16()
            changes: dict[str, Any] = {"dropout": p} if p else {}
            variant = Variant("lora", model, 8, 8, SCHEDULE, **changes)
        variant.model.train()
        ids = torch.arange(256).view(4, 64) % 32
        parameters = tuple(variant.model.parameters())
        return int(kept_bytes(lambda: variant.model.model(input_ids=ids).last_hidden_state, parameters))

    without = kept(Dropout, 0.0)
    before, after = (f"{kept(kind, 0.05) / without:.2f}" for kind in (WithMask, Dropout))
    yield "bytes kept for backward with dropout 0.05, all linear maps, of those without", before, after


def logits() -> Iterator[tuple[str, str, str]]:
    vocabulary, num_targets = 16_000, 16_384
    model = tiny_llama(vocabulary, 16)
    model.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(True)
    ids = torch.randint(3, vocabulary, (16, num_targets // 16))
    peaks, sums = [], []
    for size in (0, "auto"):
        losses: Any = TokenLosses(size)
        sums.append(losses(model, {"input_ids": ids[:1, :9]}, ids[:1, :9]).item())
        peaks.append(peak_bytes(lambda do=losses: do(model, {"input_ids": ids}, ids).backward()))
    assert abs(sums[0] - sums[1]) < 1e-6 * sums[0]
    shown = f"{num_targets:,} targets x {vocabulary:,} words, fp32, {automatic_chunk(vocabulary):,} at a time"
    yield f"peak of a loss and its backward, GB: {shown}", f"{peaks[0] / 1e9:.2f}", f"{peaks[1] / 1e9:.2f}"
    whole, chunked = (logits_bytes(8192, 128_256, size) / 1e9 for size in (0, "auto"))
    yield "the same by formula, GB: 8,192 x 128,256, bf16", f"{whole:.2f}", f"{chunked:.2f}"


def questions(count: int, choices: tuple[str, ...]) -> list[Example]:
    draws, words = random.Random(0), [f"w{k}" for k in range(500)]
    tail = f"\n\nAnswer format: {'/'.join(choices)}"
    return [
        Example(" ".join(draws.choices(words, k=draws.randint(20, 60))) + tail, "",
                f"the correct answer is {choices[0]}", choices[0], choices, "arc_easy", f"train.json:{k}")
        for k in range(count)
    ]  # fmt: skip


def evaluation() -> Iterator[tuple[str, str, str]]:
    tokenizer, model = byte_tokenizer(), tiny_llama(259)
    for choices in (("answer1", "answer2"), ("answer1", "answer2", "answer3", "answer4")):
        examples = questions(64, choices)
        read: list[int] = []

        def count(_model: nn.Module, _: Any, inputs: dict[str, torch.Tensor], read: list[int] = read) -> None:
            read.append(inputs["input_ids"].numel())

        with model.register_forward_pre_hook(count, with_kwargs=True):
            evaluate_choices(model, tokenizer, examples, 8, 1024)
        prompts = [len(prompt_tokens(e, tokenizer, 1024)) for e in examples]
        replies = [[len(reply) for reply in choice_tokens(e, tokenizer)] for e in examples]
        needed = sum(prompt + max(reply) - 1 for prompt, reply in zip(prompts, replies, strict=True))
        before = sum(prompt + n for prompt, reply in zip(prompts, replies, strict=True) for n in reply)
        what = f"tokens of an evaluation by likelihood, {len(choices)} choices, of those needed"
        yield what, f"{before / needed:.2f}", f"{sum(read) / needed:.2f}"


def decoding() -> Iterator[tuple[str, str, str]]:
    model = Variant("adalora", llama(64, 176, 4), 8, 8, SCHEDULE).model.eval()

    def operations() -> int:
        counts = Counts()
        with torch.no_grad(), counts:
            model(input_ids=torch.tensor([[3]]))
        return counts.aten.total()

    before = operations()
    with merged(model):
        yield "operations of a decoding step, 4 layers, 28 matrices: adapters merged", str(before), str(operations())


def micro_batches() -> Iterator[tuple[str, str, str]]:
    """Of rows from 20 to 1,000 tokens, most of them short, 128 to a step."""
    draws = random.Random(0)
    lengths = [min(1000, 20 + int(draws.expovariate(1 / 120))) for _ in range(4096)]
    plan = BatchPlan(lengths, lengths, 128, seed=6)
    steps = range(plan.num_batches_per_epoch)
    for what, summary in (("largest", max), ("median", median)):
        rows_alone, within = (
            f"{int(summary([plan.positions(rows) for step in steps for rows in plan.parts(step, 1, 16, limit)])):,}"
            for limit in (0, 8192)
        )
        yield f"{what} micro-batch, positions: 16 rows at a time, at most 8,192 tokens", rows_alone, within


def checkpointing() -> Iterator[tuple[str, str, str]]:
    def peak(**how: Any) -> str:
        model = Variant("adalora", llama(128, 344, 8), 8, 8, SCHEDULE).model.train()
        checkpoint_activations(model, ActivationsConfig(gradient_checkpointing=bool(how), **how))
        ids = torch.arange(2048).view(2, 1024) % 32
        return f"{peak_bytes(lambda: model.model(input_ids=ids).last_hidden_state.sum().backward()) / 1e6:.1f}"

    kinds: tuple[Any, ...] = (4, 2, "selective", "full")
    for kind in kinds:
        what = f"peak of forward and backward, MB: 2 x 1,024 tokens, 8 layers of 128, checkpoint_activations {kind}"
        yield what, peak(), peak(checkpoint_activations=kind)


def state() -> Iterator[tuple[str, str, str]]:
    def of(method: str, whole: bool = False) -> float:
        sizes = {bound: ("MIN_PORTION", "CACHED_PORTION"), products: ("_SIDE_BY_SIDE", "_CACHED")}
        with ExitStack() as stack:
            for module, names in sizes.items():
                for name in names if whole else ():
                    stack.enter_context(mock.patch.object(module, name, 2**40))
            variant = Variant(method, llama_7b_in_one_memory(), 12, 8, SCHEDULE)
            ids = torch.arange(2)[None]
            for _ in range(3):
                variant.step(ids)
            trained = sum(p.numel() for p in variant.trainable)
            held = 12 * trained + (8 * trained if method == "adalora" else 0)
            if method == "adalora":
                held += sum(8 * buffer.data.numel() for buffer in variant.hooks.method_step.bound._values[:1])
            return float(held + peak_bytes(lambda: variant.step(ids))) / trained

    before, after, lora = of("adalora", whole=True), of("adalora"), of("lora")
    what = "AdaLoRA's state at the peak, bytes an element: LLaMA-7B, all 224 matrices, 12 triplets each"
    yield f"{what} (LoRA: {lora:.2f})", f"{before:.2f}", f"{after:.2f}"


def llama_7b_in_one_memory() -> nn.Module:
    """LLaMA-7B's layers, whose frozen weights begin at different places of one memory: the state does not see them."""
    model: nn.Module = llama(4096, 11008, 1, 32, use_cache=False)
    backbone: Any = model.model
    [layer] = backbone.layers
    weights = [p for p in layer.parameters() if p.ndim == 2]
    starts = iter(range(0, 64 * 32 * len(weights), 64))
    memory = torch.randn(max(p.numel() for p in weights) + 64 * 32 * len(weights)).mul_(0.02)

    def in_memory(weight: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(memory[next(starts) :][: weight.numel()].view_as(weight))

    backbone.layers = nn.ModuleList(
        copy.deepcopy(layer, {id(weight): in_memory(weight) for weight in weights}) for _ in range(32)
    )
    backbone.config.num_hidden_layers = 32
    return model


def engines() -> Iterator[tuple[str, str, str]]:
    """On two processes, over the same method on one: a step without a selection."""
    [alone] = run_ranks(1, count_run, "single", "adalora")
    for engine, name in (("fsdp2", "FSDP2"), ("zero3", "ZeRO-3")):
        before, after = (
            of_engine(run_ranks(2, count_run, engine, "adalora", NUM_LAYERS, True, packs, timeout=600)[0], alone)
            for packs in (False, True)
        )
        yield (
            f"operations that {name} adds, a matrix, 7 in each of {NUM_LAYERS} blocks",
            f"{before:.1f}",
            f"{after:.1f}",
        )


def checkpoints() -> Iterator[tuple[str, str, str]]:
    """Wall time, as a file system waits without computing."""

    def waits(asynchronous: bool) -> float:
        variant = Variant("lora", llama(256, 688, 8), 64, 64, SCHEDULE)
        variant.step(torch.arange(2)[None])
        trained = trained_parameters(variant.model)
        megabytes = 12 * sum(p.numel() for p in trained.values()) / 1e6
        with tempfile.TemporaryDirectory() as folder:
            writer, found = CheckpointWriter(Path(folder), 1, asynchronous), []
            for step in range(5):
                begun = time.perf_counter()
                writer.save(step, trained, variant.optimizer, variant.hooks, {})
                found.append((time.perf_counter() - begun) * 48 / megabytes)
                writer.wait()
        return median(found)

    yield "seconds that a loop waits for a checkpoint of 48 MB", f"{waits(False):.2f}", f"{waits(True):.2f}"


def start() -> Iterator[tuple[str, str, str]]:
    examples = questions(NUM_QUESTIONS, ("answer1", "answer2"))
    tokenizer = word_tokenizer([examples[0].instruction, "### Instruction : Response the correct answer is answer1"])
    few = examples[:2000]
    one_by_one = seconds(lambda: [encode_example(e, tokenizer, 256) for e in few]) * NUM_QUESTIONS / len(few)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict("os.environ", {"ADALORA_DIST_CACHE": folder}):
        first = seconds(lambda: encode_examples(examples, tokenizer, 256))
        second = seconds(lambda: encode_examples(examples, tokenizer, 256))
    yield f"tokens of {NUM_QUESTIONS:,} questions, CPU s: first start", f"{one_by_one:.1f}", f"{first:.1f}"
    yield "the same, second start", f"{one_by_one:.1f}", f"{second:.1f}"


def seconds(action: Callable[[], Any]) -> float:
    begun = time.process_time()
    action()
    return time.process_time() - begun


def main() -> None:
    torch.set_num_threads(1)
    print("| what | before | after |\n|---|---:|---:|")
    for row in rows():
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
