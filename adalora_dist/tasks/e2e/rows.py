"""E2E NLG: meaning representations and the sentences that say them.

A local source is a folder with train and test files (.jsonl or .parquet), or one file, of rows with mr and ref, or with
other columns that ``columns`` names; the word ``hub``
reads tuetschek/e2e_nlg; an empty source is the built-in places. A meaning representation that has several rows has
several references: each trains, and a generated text is scored against all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adalora_dist.config.row_files import names_file
from adalora_dist.io.errors import UserError
from adalora_dist.tasks.e2e.config import E2EDataConfig
from adalora_dist.tasks.e2e.demo import demo_places
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.fields import object_row, text_field
from adalora_dist.tasks.rows.held_out import validation_of
from adalora_dist.tasks.rows.hub import HubData
from adalora_dist.tasks.rows.source import built_in, checked_rows, renaming, split_of
from adalora_dist.tasks.rows.token_cache import Columns, cached_columns
from adalora_dist.tasks.rows.tokens import IGNORED, EncodedRow, eos_tokens, refuse_no_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB = HubData("tuetschek/e2e_nlg", revision="refs/convert/parquet")
"""The data set comes with a loading script; the Hub's own conversion needs none."""
Pairs = list[tuple[str, str]]
"""(meaning representation, reference) of rows."""
_FIELDS = (("mr", "meaning_representation"), ("ref", "human_reference"))


def load_e2e(data: E2EDataConfig, split: str, bad_rows: BadRows | None = None) -> list[tuple[str, str]]:
    """(meaning representation, reference) of every row, in the order of the source. Never imports torch.

    What becomes of rows that cannot be used ``bad_rows`` says, and counts. ``max_train_rows`` keeps the first rows,
    ``max_eval_rows`` the rows of the first meaning representations.

    Raises:
        UserError: a file or a field is missing, a file cannot be read, the Hub cannot be reached, or there is no row.
    """
    rows = _rows(data, split, bad_rows or BadRows(data.bad_rows))
    if split == "train":
        return rows[: data.max_train_rows]
    kept = set(list(dict.fromkeys(mr for mr, _ in rows))[: data.max_eval_rows])
    return [(mr, ref) for mr, ref in rows if mr in kept]


def load_e2e_parts(
    data: E2EDataConfig, bad_rows: BadRows | None = None, validates: bool = False
) -> tuple[Pairs, Pairs, Pairs | None]:
    """(training rows, rows to evaluate on before and after, and while training, if ``validates``). See
    :func:`load_e2e`.

    All rows of a meaning representation are in one part. Of a source that is one file, the last two are the same.
    """
    train, validation = validation_of(
        data, validates, load_e2e(data, "train", bad_rows), lambda name: load_e2e(data, name, bad_rows),
        lambda rows: (mr for mr, _ in rows), lambda rows, numbers: [rows[number] for number in numbers],
        data.max_eval_rows,
    )  # fmt: skip
    if validation is not None and names_file(data.source):
        return train, validation, validation
    return train, load_e2e(data, "test", bad_rows), validation


def by_meaning(rows: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """All references of each meaning representation, in the order of the rows."""
    grouped: dict[str, list[str]] = {}
    for mr, ref in rows:
        grouped.setdefault(mr, []).append(ref)
    return grouped


def prompt_text(mr: str) -> str:
    """What the model reads; the text to write follows after a space."""
    return f"{mr} ||"


def encode_rows(
    rows: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int, show_progress: bool = True
) -> list[EncodedRow]:
    """Prompt + text + EOS of every row, the loss on the text and EOS; from the cache if it is there.

    Raises:
        UserError: a row is longer than ``max_length``.
    """

    def encode(chunk: Sequence[tuple[str, str]]) -> Columns:
        columns: Columns = {"input_ids": [], "labels": []}
        prompts = prompt_tokens([mr for mr, _ in chunk], tokenizer)
        texts = tokenizer([f" {ref}" for _, ref in chunk], add_special_tokens=False)["input_ids"]
        refuse_no_tokens(texts, lambda row: chunk[row][1])
        for prompt, text in zip(prompts, texts, strict=True):
            target = [*text, *eos_tokens(tokenizer)]
            columns["input_ids"].append([*prompt, *target])
            columns["labels"].append([IGNORED] * len(prompt) + target)
        return columns

    if not rows:
        return []
    columns = cached_columns(rows, tokenizer, {"e2e": True}, encode, "tokenise", show_progress)
    for number, tokens in enumerate(columns["input_ids"], start=1):
        if len(tokens) > max_length:
            raise UserError(
                f"training row {number} has {len(tokens)} tokens, max_length={max_length} must be as many: set "
                f"--max-length {len(tokens)} or remove the row"
            )
    return [
        {"input_ids": tokens, "labels": labels}
        for tokens, labels in zip(columns["input_ids"], columns["labels"], strict=True)
    ]


def prompt_tokens(mrs: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of each prompt, without EOS, which some tokenizers put behind every text.

    Raises:
        UserError: a prompt has no tokens.
    """
    prompts = tokenizer([prompt_text(mr) for mr in mrs])["input_ids"]
    eos = tokenizer.eos_token_id
    prompts = [prompt[:-1] if prompt[-1:] == [eos] else prompt for prompt in prompts]
    refuse_no_tokens(prompts, lambda row: mrs[row])
    return prompts


def _rows(data: E2EDataConfig, split: str, bad: BadRows) -> Pairs:
    if not data.source:
        return demo_places(built_in(split))
    if data.source == "hub":
        instead = "--data FOLDER with FOLDER/train.jsonl and FOLDER/test.jsonl"
        return checked_rows(HUB.where(split), HUB.rows(split, instead), _pair, bad)
    found = split_of(Path(data.source), split)
    return checked_rows(found.where, found.rows(), renaming(_pair, data.column_of), bad)


def _pair(row: object, origin: str) -> tuple[str, str]:
    row = object_row(row, origin, ("mr", "ref"))
    present = (next((name for name in names if name in row), names[0]) for names in _FIELDS)
    mr, ref = (text_field(row, name, origin, can_map=True) for name in present)
    return mr, ref
