"""Columns of other names: what is proposed where no form has them, and that each column is read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.sft.config import SftDataConfig
from adalora_dist.tasks.sft.forms import recognise
from tests.support.refusals import refused
from tests.support.sft_rows import HELLO, Row, contents, lines, load

pytestmark = pytest.mark.usefixtures("cache")

BOTH = "user: Q / assistant: A"
PROPOSALS: dict[str, tuple[Row, str, str]] = {
    "question and answer": ({"question": "Q", "answer": "A"}, "instruction=question,output=answer", BOTH),
    "query and response": ({"id": 1, "query": "Q", "response": "A"}, "instruction=query,output=response", BOTH),
    "prompt and response": ({"prompt": "Q", "response": "A"}, "instruction=prompt,output=response", BOTH),
    "input and output": ({"input": "Q", "output": "A"}, "instruction=input", BOTH),
    "inputs and targets": ({"task": "x", "inputs": "Q", "targets": "A"}, "instruction=inputs,output=targets", BOTH),
    "instruction and response": ({"instruction": "Q", "response": "A"}, "output=response", BOTH),
    "capitals": ({"Instruction": "Q", "Output": "A"}, "instruction=Instruction,output=Output", BOTH),
    "Dolly": (
        {"instruction": "Q", "context": "C", "response": "A", "category": "x"},
        "output=response,input=context",
        "user: Q\n\nC / assistant: A",
    ),
    "Orca": (
        {"system_prompt": "S", "question": "Q", "response": "A"},
        "instruction=question,output=response,system=system_prompt",
        f"system: S / {BOTH}",
    ),
    "a conversation": (
        {"id": 7, "conversation": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        "messages=conversation",
        BOTH,
    ),
    "pairs": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "completion=chosen", "Q|A"),
    "pairs to questions": (
        {"question": "Q", "chosen": "A", "rejected": "B"}, "prompt=question,completion=chosen", "Q|A",
    ),
    "pairs of texts": ({"chosen": "Q A", "rejected": "Q B"}, "text=chosen", "Q A"),
    "pairs of conversations": (
        {"chosen": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "rejected": []},
        "messages=chosen",
        BOTH,
    ),
    "texts": ({"content": "One.", "id": 3}, "text=content", "One."),
    "a blank": ({"question": "Q", "Final Answer": "", "answer": "A"}, "instruction=question,output=answer", BOTH),
}  # fmt: skip


def short(content: Row) -> str:
    if "messages" in content:
        return " / ".join(f"{turn['role']}: {turn['content']}" for turn in content["messages"])
    return "|".join(content.values())


@pytest.mark.parametrize(("row", "columns", "expected"), PROPOSALS.values(), ids=PROPOSALS)
def test_the_error_proposes_what_works(row: Row, columns: str, expected: str) -> None:
    with refused(f"a.jsonl: no known form has the columns .*add --columns {columns}$"):
        recognise([row], {}, "a.jsonl")
    given = dict(pair.split("=") for pair in columns.split(","))
    assert short(recognise([row], given, "a.jsonl")(row, "a.jsonl:1")) == expected


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"a": 1}], "name yours with --columns instruction=QUESTION,output=ANSWER"),
        ([{"data": [{"text": "a"}]}], "its one row has a list of objects, data: write these, one per line"),
        ([["a", "b"]], r"its first row is \['a', 'b'\]; legal: an object with messages"),
        ([{"question ": "b", "answer": "c"}], "name yours with"),  # --columns leaves blanks out
        ([{"Frage": "b", "Antwort": "c"}], "name yours with --columns instruction=QUESTION"),
    ],
)  # fmt: skip
def test_other_rows_have_a_remedy_too(rows: list[Any], reason: str) -> None:
    with refused(reason):
        recognise(rows, {}, "a.json")


def test_pairs_whose_conversation_waits_for_a_reply(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"}}
    (tmp_path / "a.jsonl").write_text(lines([row]))
    with refused("a.jsonl:1: .*no assistant turn.*add --columns prompt=conversations,completion=chosen$"):
        load(str(tmp_path / "a.jsonl"))
    [table] = load(str(tmp_path / "a.jsonl"), columns=("prompt=conversations,completion=chosen",))
    assert short(contents(table)[0]) == BOTH


def test_a_column_is_one_field() -> None:
    row = {"input": "Q", "output": "A", "system": "S"}
    reader = recognise([row], {"instruction": "system"}, "a.jsonl")
    assert short(reader(row, "a.jsonl:1")) == "user: S\n\nQ / assistant: A" and reader.sentence.endswith("=system)")
    with refused("a.jsonl: column output would be both instruction and output; give each its own"):
        recognise([row], {"instruction": "output"}, "a.jsonl")
    with refused("column input would be both instruction and input"):
        recognise([row], {"instruction": "input", "input": "input"}, "a.jsonl")


def test_a_completion_has_the_prompt_once() -> None:
    row = {"prompt": "Q", "completion": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    content = recognise([row], {}, "a")(row, "a:1")
    assert short(content) == BOTH and content["first"] == 1
    row["prompt"] = [{"role": "system", "content": " "}, {"role": "user", "content": "Q"}]
    content = recognise([row], {}, "a")(row, "a:1")
    assert short(content) == BOTH and content["first"] == 1
    row["prompt"] = "P"
    content = recognise([row], {}, "a")(row, "a:1")
    assert short(content) == f"user: P / {BOTH}" and content["first"] == 1


def test_earlier_turns_of_a_question() -> None:
    row = {"instruction": "Q", "input": "", "output": "A", "system": "S", "history": [["q", "a"]]}
    assert short(recognise([row], {}, "a")(row, "a:1")) == f"system: S / user: q / assistant: a / {BOTH}"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    again = recognise([row], {}, "a")(row | {"history": messages}, "a:1")
    assert short(again) == f"system: S / user: q / assistant: a / {BOTH}"
    for empty in (None, [], "", float("nan")):
        assert short(recognise([row], {}, "a")(row | {"history": empty}, "a:1")) == f"system: S / {BOTH}"
    for wrong, reason in (
        (["q"], r"history is \['q'\]; legal: a list of"),
        ([["q", ""]], r"history\[0\].answer is ''"),
    ):
        with refused(f"a:1: field {reason}"):
            recognise([row], {}, "a")(row | {"history": wrong}, "a:1")
    assert SftDataConfig(source=("a",), columns=("history=before",)).column_of == {"history": "before"}
    with pytest.raises(UserError, match="one of messages, .*history"):
        SftDataConfig(source=("a",), columns=("past=before",))


def test_names_are_for_the_sources_that_have_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"messages": HELLO}] * 2))
    (tmp_path / "b.jsonl").write_text(lines([{"question": "Q", "answer": "A"}]))
    (tmp_path / "c.jsonl").write_text(lines([{"question": "Q", "reply": "A"}]))
    said: list[str] = []
    words, columns = (f"{tmp_path}/a.jsonl=2", f"{tmp_path}/b.jsonl=0.5"), ("instruction=question,output=answer",)
    first, second = load(*words, columns=columns, said=said)
    assert contents(first) == [{"messages": HELLO}] * 2 and short(contents(second)[0]) == BOTH
    assert (first.weight, second.weight) == (2, 0.5)
    assert said[0].endswith("a.jsonl: messages; 2 rows, each 2 times") and "(instruction=question," in said[1]
    with refused("c.jsonl: no column answer, which columns gives to output; it has question, reply"):
        load(*words, f"{tmp_path}/c.jsonl", columns=columns)
    with refused("a.jsonl: no column question, which columns gives to instruction; it has messages"):
        load(f"{tmp_path}/a.jsonl", columns=columns)
