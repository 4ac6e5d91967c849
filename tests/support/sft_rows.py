"""Rows of one's own texts, as files and as what is read from them; small conversations, and tokens with marks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.tokens import IGNORED
from adalora_dist.tasks.sft.config import SftDataConfig, SftEvaluationConfig
from adalora_dist.tasks.sft.preview import marked_text
from adalora_dist.tasks.sft.rows import SftRows, Table, load_rows, load_tables
from adalora_dist.tasks.sft.template import ChatTemplate
from tests.support.chat_templates import STYLES, Style, Turns
from tests.support.tiny_language_model import byte_tokenizer

Row = dict[str, Any]

HELLO = [{"role": "user", "content": "Hi – é"}, {"role": "assistant", "content": "Hello\r\nthere 日本"}]

FIRST = (("user", "Hi – é?"), ("assistant", "Hello\nthere"))
CONVERSATIONS: dict[str, Turns] = {
    "one turn": FIRST,
    "three turns": (*FIRST, ("user", "And?"), ("assistant", "No."), ("user", "Why?"), ("assistant", "日本")),
    "a system turn": (("system", "Be brief."), *FIRST, ("user", "And?"), ("assistant", "No.")),
    "a question at the end": (*FIRST, ("user", "And?")),
}


def lines(rows: Iterable[object]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def load(*words: str, bad: BadRows | None = None, said: list[str] | None = None, **settings: Any) -> list[Table]:
    data = SftDataConfig(source=words, **settings)
    return load_tables(data, bad or BadRows("error"), (said if said is not None else []).append)[0]


def contents(table: Table) -> list[Row]:
    return [json.loads(row) for row in table.contents["row"]]


def tokenizer_of(chat_template: str | None, specials: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    tokenizer.chat_template = chat_template
    return tokenizer


def content(turns: Turns) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def marked(template: ChatTemplate, row: dict[str, Any], train_on: Any = "assistant", max_length: int = 4096) -> str:
    encoded = template.encode(row, "a.jsonl:1", train_on, max_length)
    assert len(encoded["labels"]) == len(encoded["input_ids"])
    assert all(label in (IGNORED, token) for token, label in zip(*encoded.values(), strict=True))
    return marked_text(encoded, template.tokenizer, colour=False)


def loaded(
    tmp_path: Path, rows: list[dict[str, Any]], style: Style = STYLES["chatml"], bad: BadRows | None = None,
    said: list[str] | None = None, samples: int = 0, name: str = "a.jsonl", **settings: Any,
) -> SftRows:  # fmt: skip
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"source": (str(tmp_path / name),), "eval_share": 0.0} | settings
    evaluation = SftEvaluationConfig(show_samples=samples, max_new_tokens=8)
    tokenizer = tokenizer_of(style.plain, style.specials)
    lines = said if said is not None else []
    return load_rows(SftDataConfig(**settings), tokenizer, bad or BadRows("error"), lines.append, 3, evaluation)
