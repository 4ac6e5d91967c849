"""From ``--data`` to sequences of tokens on disk: rows to train on, rows to measure the validation loss on.

Rows never become Python lists: what was recognised and checked lies in an Arrow file in the cache, its tokens in
another one beside it, and both are mapped into memory. In memory are a few numbers for each row.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from adalora_dist.io.digest import digest_of
from adalora_dist.io.errors import UserError
from adalora_dist.io.mapped import release_mapped
from adalora_dist.tasks.batches import BatchPlan, count_targets
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.files import LocalSplit
from adalora_dist.tasks.rows.held_out import border, keys_of
from adalora_dist.tasks.rows.table import MAPPED, Split, checked_table, chunks, digest_of_tokens
from adalora_dist.tasks.rows.token_cache import rules_of
from adalora_dist.tasks.sft.config import SftDataConfig, SftEvaluationConfig
from adalora_dist.tasks.sft.demo import demo_conversations
from adalora_dist.tasks.sft.forms import Content, Reader, columns_of, recognise
from adalora_dist.tasks.sft.samples import Sample
from adalora_dist.tasks.sft.sources import first_rows, parse_source, validation_splits
from adalora_dist.tasks.sft.template import ChatTemplate, RefusedRow, set_template

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_VERSION = 2
"""Of what contents become; part of the name of what is cached."""
_USABLE, _CUT, _EMPTIED, _REFUSED = range(4)
"""What became of a row: it is whole; cut to max_length; cut so that no reply is left; not taken by the template."""

Say = Callable[[str], None]


class Table(NamedTuple):
    """Checked rows of one source: ``contents`` has the columns row (JSON of ``forms.Content``) and origin."""

    contents: Dataset
    weight: float = 1.0

    def content(self, index: int) -> tuple[Content, str]:
        row = self.contents[index]
        return json.loads(row["row"]), row["origin"]


class SftRows(NamedTuple):
    """What a run trains and is evaluated on. ``train`` and ``held_out`` are data sets of tokens (``encode_table``)."""

    train: Dataset
    held_out: Dataset
    samples: list[Sample]
    """Of the first rows that are held out and ask for a reply."""
    closing: list[int]
    """Tokens that close a reply besides EOS."""

    def plan(self, batch_size: int, seed: int, group_by_length: bool) -> BatchPlan:
        lengths, num_targets = self.train["num_tokens"][:], self.train["num_targets"][:]
        return BatchPlan(lengths, num_targets, batch_size, seed, group_by_length, digest_of_tokens(self.train))


def load_tables(data: SftDataConfig, bad: BadRows, say: Say) -> tuple[list[Table], list[Table]]:
    """Rows of all sources to train on, and those that the user, or a folder, has set apart for validation.

    Raises:
        UserError: a source or its form is not known, a row cannot be used, or none is left.
    """
    if not data.source:
        return [_demo_table("train", data.max_train_rows)], [_demo_table("validation", data.max_eval_rows)]
    sources = [parse_source(word) for word in data.source]
    splits = [source.training() for source in sources]
    eval_splits = validation_splits(sources, data.eval_split) if data.eval_share is None else []
    used = {file for split in splits + eval_splits if isinstance(split, LocalSplit) for file in split.files}
    for source in sources:
        if remarks := source.remarks(used):
            say(f"{source.name}: {remarks}")
    readers = _readers(splits + eval_splits, data.column_of)
    train = [
        Table(_contents(split, reader, bad, say, data.max_train_rows, source.weight), source.weight)
        for source, split, reader in zip(sources, splits, readers, strict=False)
    ]
    return train, [
        Table(_contents(split, reader, bad, say, data.max_eval_rows))
        for split, reader in zip(eval_splits, readers[len(splits) :], strict=True)
    ]


def num_training_rows(tables: Sequence[Table], eval_tables: Sequence[Table], data: SftDataConfig) -> int:
    """Rows of an epoch, if all of :func:`load_tables` can be used: without those held out, as often as weights say."""
    kept = [list(range(len(table.contents))) for table in tables]
    if not eval_tables:
        kept, _ = _hold_out(tables, kept, data)
    return sum(len(_weighted(rows, table.weight, "")) for table, rows in zip(tables, kept, strict=True))


def load_rows(
    data: SftDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    bad: BadRows,
    say: Say,
    seed: int,
    evaluation: SftEvaluationConfig,
) -> SftRows:
    """Tokens of all rows, and which of them are held out. Gives the tokenizer a chat template, if rows need one.

    Args:
        seed: which part of the rows of a source a weight with a fraction takes.
        evaluation: says how many prompts are to be replied to; prompts and replies stay within ``max_length``.

    Raises:
        UserError: as :func:`load_tables`; the template cannot be used, or refuses a row; no row is left.
    """
    tables, eval_tables = load_tables(data, bad, say)
    if any("messages" in table.content(0)[0] for table in tables + eval_tables):
        say(set_template(tokenizer, data.chat_template))
    elif data.chat_template:
        raise UserError(
            f"chat_template={data.chat_template}: no row is a conversation, so it would not be read; leave it out"
        )
    template = ChatTemplate(tokenizer)
    say_what_is_left_out(tables, template, say)
    counts: Counter[int] = Counter()
    parts = [_encoded(table, template, data, bad, counts) for table in tables]
    if eval_tables:
        eval_parts = [_encoded(table, template, data, bad, counts) for table in eval_tables]
        held = [tokens.select(usable) for tokens, usable in eval_parts]
        held_tables = [(table, usable) for table, (_, usable) in zip(eval_tables, eval_parts, strict=True)]
        kept = [usable for _, usable in parts]
    else:
        kept, held_tables = _hold_out(tables, [usable for _, usable in parts], data)
        held = [tokens.select(rows) for (tokens, _), (_, rows) in zip(parts, held_tables, strict=True)]
    train = _joined(
        [
            tokens.select(_weighted(rows, table.weight, f"{seed} {number}"))
            for number, (table, (tokens, _), rows) in enumerate(zip(tables, parts, kept, strict=True))
        ]
    )
    if counts[_CUT] or counts[_EMPTIED]:
        say(
            f"Cut: {counts[_CUT] + counts[_EMPTIED]:,} rows are longer than max_length={data.max_length}; "
            f"{counts[_EMPTIED]:,} of them are left out, because no part of a reply is left"
        )
    if not len(train):
        raise UserError("data: no row is left to train on; give more rows, or --eval-share 0, or a larger --max-length")
    held_out = _joined(held)
    say(f"{len(train):,} training rows, {len(held_out):,} validation rows")
    longest = max(1, data.max_length - evaluation.max_new_tokens)
    samples = _samples(held_tables, template, evaluation.show_samples, longest)
    return SftRows(train, held_out, samples, _closing(template, train))


def say_what_is_left_out(tables: Sequence[Table], template: ChatTemplate, say: Say) -> None:
    """How many rows have descriptions of tools, or thoughts, that the chat template has no place for."""
    for what, marks in (
        (
            "Tools: the chat template has no place for their descriptions",
            [] if template.reads_tools else ['"tools": ['],
        ),
        (
            "Thoughts: the chat template has no place for those beside a text",
            [f'"{name}": "' for name in template.unread_thoughts],
        ),
    ):
        if marks and (count := sum(_num_with(table.contents, marks) for table in tables)):
            say(f"{what}, which {count:,} rows have: left out")


def encode_table(table: Dataset, template: ChatTemplate, data: SftDataConfig, policy: str) -> Dataset:
    """``input_ids``, ``labels``, ``num_tokens``, ``num_targets``, ``outcome`` and ``problem`` of each row, on disk.

    ``outcome`` is one of the four above, ``problem`` why the row was refused.

    Raises:
        UserError: the template refuses a row, and ``policy`` is not skip; or it cannot be used at all.
    """
    from datasets import Features, List, Value

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {name: [] for name in features}
        for row, origin in zip(batch["row"], batch["origin"], strict=True):
            problem, outcome = "", _USABLE
            try:
                encoded = template.encode(json.loads(row), origin, data.train_on, data.max_length + 1)
            except RefusedRow as error:
                if policy != "skip":
                    raise
                encoded, problem, outcome = {"input_ids": [], "labels": []}, str(error), _REFUSED
            num_targets = count_targets(encoded["labels"])
            if len(encoded["input_ids"]) > data.max_length:
                encoded = {"input_ids": encoded["input_ids"][:-1], "labels": encoded["labels"][:-1]}
                num_targets = count_targets(encoded["labels"])
                outcome = _CUT if num_targets else _EMPTIED
            values = (encoded["input_ids"], encoded["labels"], len(encoded["input_ids"]), num_targets, outcome, problem)
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
        release_mapped(MAPPED)
        return columns

    numbers = List(Value("int32"))
    features = Features(
        input_ids=numbers, labels=numbers, num_tokens=Value("int32"), num_targets=Value("int32"),
        outcome=Value("int8"), problem=Value("string"),
    )  # fmt: skip
    how = [_VERSION, template.tokenizer.chat_template, data.train_on, data.max_length, policy, table._fingerprint]
    tokenizer = [type(template.tokenizer).__name__, rules_of(template.tokenizer)]
    return table.map(
        encode, batched=True, batch_size=500, writer_batch_size=500, remove_columns=table.column_names,
        features=features, new_fingerprint=digest_of([json.dumps([how, tokenizer], default=str).encode()])[:32],
        desc="tokenise",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- tables


def _readers(splits: Sequence[Split], column_of: Mapping[str, str]) -> list[Reader]:
    """One for each split. Names of columns are for the splits that have them; any other one has a form as it is."""
    first = [first_rows(split) for split in splits]
    renamed = {column for field, column in column_of.items() if field != column}
    has_them = [bool(renamed & set(columns_of(rows))) for rows in first]
    return [
        recognise(rows, column_of if has or not any(has_them) else {}, split.where)
        for rows, has, split in zip(first, has_them, splits, strict=True)
    ]


def _contents(split: Split, reader: Reader, bad: BadRows, say: Say, max_rows: int | None, weight: float = 1) -> Dataset:
    def parse(row: object, origin: str) -> dict[str, str]:
        return {"row": json.dumps(reader(row, origin), ensure_ascii=False), "origin": origin}

    table = checked_table(split, ("row", "origin"), parse, bad, max_rows, reader.identity)
    counts = "" if weight == 1 else f", each {weight:g} times"
    say(f"{split.where}: {reader.sentence}; {len(table):,} rows{counts}")
    return table


def _demo_table(split: Any, max_rows: int | None) -> Table:
    from datasets import Dataset

    rows = [
        {"row": json.dumps(content), "origin": f"built-in:{number}"}
        for number, content in enumerate(demo_conversations(split)[:max_rows], start=1)
    ]
    return Table(Dataset.from_list(rows))


# ----------------------------------------------------------------------------------------- which rows are what


def _encoded(
    table: Table, template: ChatTemplate, data: SftDataConfig, bad: BadRows, counts: Counter[int]
) -> tuple[Dataset, list[int]]:
    """(tokens of all rows, numbers of those that can be used); the others are counted."""
    tokens = encode_table(table.contents, template, data, bad.policy)
    outcomes = np.asarray(tokens.with_format("numpy")["outcome"][:])
    counts.update(dict(zip(*(part.tolist() for part in np.unique(outcomes, return_counts=True)), strict=True)))
    refused: dict[str, list[int]] = {}
    for index in np.flatnonzero(outcomes == _REFUSED).tolist():
        refused.setdefault(table.contents[index]["origin"].rpartition(":")[0], []).append(index)
    for file, rows in refused.items():
        bad.leave_out(file, len(rows), tokens[rows[0]]["problem"])
    release_mapped(MAPPED)
    return tokens, np.flatnonzero((outcomes == _USABLE) | (outcomes == _CUT)).tolist()


def _hold_out(
    tables: Sequence[Table], usable: Sequence[list[int]], data: SftDataConfig
) -> tuple[list[list[int]], list[tuple[Table, list[int]]]]:
    """(rows to train on, rows held out) of each table.

    Which, see ``tasks/rows/held_out.py``.
    """
    keys = [_keys(table.contents)[rows] for table, rows in zip(tables, usable, strict=True)]
    last = border(np.concatenate(keys), data.eval_share, data.max_eval_rows)
    kept, held = [], []
    for table, rows, own in zip(tables, usable, keys, strict=True):
        is_held = own <= last if last >= 0 else np.zeros(len(own), dtype=bool)
        numbers = np.asarray(rows, dtype=np.int64)
        kept.append(numbers[~is_held].tolist())
        held.append((table, numbers[is_held].tolist()))
    return kept, held


def _keys(contents: Dataset) -> np.ndarray:
    return keys_of((row for part in chunks(contents) for row in part["row"]), len(contents))


def _num_with(contents: Dataset, marks: Sequence[str]) -> int:
    """How many rows have one of these beginnings of a field."""
    # Within texts, JSON writes a quotation mark with a backslash before it.
    return sum(any(mark in row for mark in marks) for part in chunks(contents) for row in part["row"])


def _weighted(rows: Sequence[int], weight: float, seed: str) -> list[int]:
    """Every row as often as ``weight`` has whole parts, and for its fraction a random part of them, in order."""
    chosen = random.Random(seed).sample(list(rows), round(weight % 1 * len(rows)))
    return [*(row for _ in range(int(weight)) for row in rows), *sorted(chosen)]


def _joined(parts: list[Dataset]) -> Dataset:
    from datasets import concatenate_datasets

    return concatenate_datasets(parts)


def _samples(
    held: Sequence[tuple[Table, Sequence[int]]], template: ChatTemplate, count: int, longest: int
) -> list[Sample]:
    samples: list[Sample] = []
    for table, rows in held:
        for index in rows:
            if len(samples) == count:
                return samples
            try:
                found = template.prompt(*table.content(index))
            except RefusedRow:  # it has been counted
                continue
            if found and found[1] and len(found[0]) <= longest:
                samples.append(Sample(*found))
    return samples


def _closing(template: ChatTemplate, train: Dataset) -> list[int]:
    first = train.select(range(min(8, len(train))))
    return sorted({token for row in first for token in template.closing(cast(Any, row))})
