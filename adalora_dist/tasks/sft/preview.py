"""A few rows as the model will see them, with the tokens marked that it is to say: what ``--dry-run`` shows."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from adalora_dist.backbones.load import load_tokenizer
from adalora_dist.config.sections import ModelConfig
from adalora_dist.io.cache import cache_folder
from adalora_dist.io.errors import UserError
from adalora_dist.tasks.demo_models.smollm2 import FOLDER_NAME, is_complete
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.tokens import IGNORED, EncodedRow
from adalora_dist.tasks.sft.config import SftDataConfig
from adalora_dist.tasks.sft.rows import Table, load_tables, num_training_rows, say_what_is_left_out
from adalora_dist.tasks.sft.template import ChatTemplate, RefusedRow, set_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_ROWS = 3
_LONGEST = 2000  # characters of one row
_GREEN, _PLAIN = "\033[32m", "\033[0m"


def preview(data: SftDataConfig, model: ModelConfig) -> tuple[int, str]:
    """(rows of an epoch, what was recognised and the first rows with trained tokens marked).

    The number does not know of rows that will be left out once they are tokens. A tokenizer that cannot be had here is
    named, and no row is shown.

    Raises:
        UserError: the data, or the chat template, cannot be used.
    """
    lines: list[str] = []
    say, bad = lines.append, BadRows(data.bad_rows)
    tables, eval_tables = load_tables(data, bad, say)
    if summary := bad.summary():
        say(summary)
    num_rows = num_training_rows(tables, eval_tables, data)
    built = cache_folder() / FOLDER_NAME
    if not model.name and not is_complete(built):
        say("Rows       not shown: the demonstration model is fetched by the first run")
        return num_rows, "\n".join(lines)
    try:
        tokenizer = load_tokenizer(model if model.name else ModelConfig(name=str(built)))
    except UserError as error:
        say(f"Rows       not shown: {error}")
        return num_rows, "\n".join(lines)
    if any("messages" in table.content(0)[0] for table in tables):
        say(set_template(tokenizer, data.chat_template))
    template, colour = ChatTemplate(tokenizer), sys.stdout.isatty()
    say_what_is_left_out(tables, template, say)
    say(f"Rows       as the model reads them, what it learns to say {'in green' if colour else 'in [[brackets]]'}:")
    refused: list[RefusedRow] = []
    for number, table in enumerate(tables):  # of each source at least one
        count = max(1, -(-(NUM_ROWS - number) // len(tables)))
        for row, origin in _first_rows(table, template, data, count, refused):
            num_targets = sum(label != IGNORED for label in row["labels"])
            say(f"--- {origin}: {len(row['input_ids'])} tokens, {num_targets} of them learnt")
            say(marked_text(row, tokenizer, colour))
    say("---")
    if refused:
        say(f"{len(refused)} of the rows before these are left out, because they cannot be used: {refused[0]}")
    return num_rows, "\n".join(lines)


def _first_rows(
    table: Table, template: ChatTemplate, data: SftDataConfig, count: int, refused: list[RefusedRow]
) -> Iterator[tuple[EncodedRow, str]]:
    """(tokens, origin) of the first rows that can be used; why others cannot is added to ``refused``."""
    for index in range(len(table.contents)):
        if not count:
            return
        content, origin = table.content(index)
        try:
            yield template.encode(content, origin, data.train_on, data.max_length), origin
            count -= 1
        except RefusedRow as error:
            if data.bad_rows != "skip":
                raise
            refused.append(error)


def show(text: str) -> None:
    """Print it, on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def marked_text(row: EncodedRow, tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    """The text of a row's tokens, special ones included, with the targets marked."""
    before, after = (_GREEN, _PLAIN) if colour else ("[[", "]]")
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    parts = []
    for is_target, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        text = _printable(str(tokenizer.decode([token for token, _ in run])))
        parts.append(f"{before}{text}{after}" if is_target else text)
    whole = "".join(parts)
    return whole if len(whole) <= _LONGEST else f"{whole[:_LONGEST]}{_PLAIN if colour else ''} ..."


def _printable(text: str) -> str:
    """Without what would move a terminal's cursor: rows are texts of others."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
