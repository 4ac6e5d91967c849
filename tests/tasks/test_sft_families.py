"""Chat templates of further families, and rows as other tools and tables write them, from a file to marked tokens."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from adalora_dist.config.sections import ModelConfig
from adalora_dist.tasks.sft.config import SftDataConfig
from adalora_dist.tasks.sft.preview import preview
from adalora_dist.tasks.sft.template import ChatTemplate, set_template
from tests.support.chat_templates import STYLES
from tests.support.refusals import refused
from tests.support.sft_rows import (
    CONVERSATIONS,
    HELLO,
    Row,
    content,
    contents,
    lines,
    load,
    loaded,
    marked,
    tokenizer_of,
)

pytestmark = pytest.mark.usefixtures("cache")

IM = ("<|im_start|>", "<|im_end|>")
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
PHI = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA2 = (
    "{% set turns, system = messages, '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set turns, system = messages[1:], '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA3 = (
    "{{ bos_token }}{% set turns, system = messages, '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set turns, system = messages[1:], messages[0]['content'] + '\n\n' %}{% endif %}"
    "{% for m in turns %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
    "{{ (system if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + ASKS
)
THINKING = (
    "{% set at = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set at.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > at.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}" + ASKS
)
FAMILIES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "phi": (
        PHI, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<s><|system|>\nBe brief.<|end|>\n<|user|>\nHi – é?<|end|>\n<|assistant|>\n[[Hello\nthere<|end|>]]\n"
        "<|user|>\nAnd?<|end|>\n<|assistant|>\n[[No.<|end|>\n</s>]]",
    ),
    "llama2": (
        LLAMA2, (),
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi – é? [/INST][[ Hello\nthere </s>]]"
        "<s>[INST] And? [/INST][[ No. </s>]]",
    ),
    "gemma3": (
        GEMMA3, ("<start_of_turn>", "<end_of_turn>"),
        "<s><start_of_turn>user\nBe brief.\n\nHi – é?<end_of_turn>\n<start_of_turn>model\n"
        "[[Hello\nthere<end_of_turn>]]\n<start_of_turn>user\nAnd?<end_of_turn>\n<start_of_turn>model\n"
        "[[No.<end_of_turn>]]\n",
    ),
    "parts": (PARTS, IM, STYLES["chatml"].expected(CONVERSATIONS["a system turn"])),
}  # fmt: skip


@pytest.mark.parametrize(("text", "specials", "expected"), FAMILIES.values(), ids=FAMILIES)
def test_replies_of_further_families(text: str, specials: tuple[str, ...], expected: str) -> None:
    tokenizer = tokenizer_of(text, specials)
    set_template(tokenizer, "")
    template, turns = ChatTemplate(tokenizer), CONVERSATIONS["a system turn"]
    assert marked(template, content(turns)) == expected
    padded = tuple((role, text if text in ("Be brief.",) else f" {text}\n") for role, text in turns)
    if " | trim" in text:
        assert marked(template, content(padded)) == expected
    first, last = expected.index("[["), expected.rindex("[[")
    assert marked(template, content(turns), "last") == (
        expected[:first] + expected[first:last].replace("[[", "").replace("]]", "") + expected[last:]
    )
    prompt, reply = template.prompt(content(turns), "")  # type: ignore[misc]
    assert template.tokenizer.decode(prompt) == expected[:last].replace("[[", "").replace("]]", "") and reply == "No."


def test_thoughts_are_learnt_where_the_model_would_have_them() -> None:
    template = ChatTemplate(tokenizer_of(THINKING, IM))
    assert template.unread_thoughts == ["reasoning", "thinking"]
    one = content(CONVERSATIONS["one turn"])
    one["messages"][1]["reasoning_content"] = "hm"
    asked = "<|im_start|>user\nHi – é?<|im_end|>\n<|im_start|>assistant\n"
    assert marked(template, one) == asked + "[[<think>\nhm\n</think>\n\nHello\nthere<|im_end|>]]\n"
    several = content(CONVERSATIONS["three turns"])
    with refused("turn 2, of the assistant, is written differently when later turns follow.*--train-on last"):
        marked(template, several)
    learnt = marked(template, several, "last")
    assert learnt.startswith(asked + "Hello\nthere<|im_end|>\n") and learnt.count("[[") == 1
    assert learnt.endswith("assistant\n[[<think>\n\n</think>\n\n日本<|im_end|>]]\n")
    begun = THINKING.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}").replace(
        "'<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n'", "''"
    )
    with refused("than the generation prompt announces it"):
        marked(ChatTemplate(tokenizer_of(begun, IM)), one)


def test_a_template_that_leaves_texts_out_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{{ m['role'] + m['text'] | default('') }}\n{% endfor %}")
    with refused("a question with its answer: the chat template leaves their texts out"):
        set_template(tokenizer_of(None), str(path))


def test_thoughts_without_a_place_are_counted(tmp_path: Path) -> None:
    said: list[str] = []
    row = content(CONVERSATIONS["one turn"])
    row["messages"][1]["thinking"] = "hm"
    loaded(tmp_path, [row, content(CONVERSATIONS["one turn"])], said=said)
    assert "Thoughts: the chat template has no place for those beside a text, which 1 rows have: left out" in said


# ------------------------------------------------------------------------------------------------------------- rows

CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
ROWS: dict[str, tuple[Row, list[Row]]] = {
    "speaker and text": ({"messages": [{"speaker": " Human ", "text": "a"}, {"speaker": "AI", "text": "b"}]}, []),
    "from and content": ({"conversations": [{"from": "prompter", "content": "a"}, {"from": "bing", "text": "b"}]}, []),
    "JSON in a text": ({"messages": json.dumps(content((("user", "a"), ("assistant", "b")))["messages"])}, []),
    "a part alone": (
        {"messages": [
            {"role": "user", "content": {"type": "input_text", "text": "a", "image_url": None}},
            {"role": "assistant", "content": {"type": "output_text", "text": "b"}},
        ]}, [],
    ),
    "a prompt of several turns": (
        {"prompt": [*HELLO, {"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        HELLO,
    ),
    "a prompt and a list": ({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}, []),
    "null columns": (
        {"system": None, "tools": None,
         "messages": [{"role": "user", "content": "a", "name": None, "tool_calls": None, "weight": None},
                      {"role": "assistant", "content": "b", "tool_calls": [], "function_call": None}]}, [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("file", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize(("row", "before"), ROWS.values(), ids=ROWS)
def test_rows_of_other_tools(tmp_path: Path, row: Row, before: list[Row], file: str) -> None:
    if file == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / file)
    else:
        (tmp_path / file).write_text(json.dumps([row]) if file == "a.json" else lines([row]))
    [found] = contents(load(str(tmp_path / file))[0])
    turns = [(turn["role"], turn["content"]) for turn in found["messages"]]
    assert turns == [*((t["role"], t["content"]) for t in before), ("user", "a"), ("assistant", "b")]
    assert found.get("first", 0) in (0, 1, len(before) + 1) and "tools" not in found


def test_calls_in_tables_have_no_fields_of_other_rows(tmp_path: Path) -> None:
    """A table gives every row all fields of all rows; those of null are none of this call's."""
    other = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    rows = [
        {"messages": [HELLO[0], {"role": "assistant", "content": None, "tool_calls": [call]}],
         "tools": [{"name": call["function"]["name"], "parameters": {"properties": call["function"]["arguments"]}}]}
        for call in (CALL, other)
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for row, call in zip(contents(load(str(tmp_path / "a.parquet"))[0]), (CALL, other), strict=True):
        assert row["messages"][1]["tool_calls"] == [call]
        [tool] = row["tools"]
        assert tool["function"]["parameters"] == {"properties": call["function"]["arguments"]}


def test_calls_as_openai_had_them_before(tmp_path: Path) -> None:
    call = {"name": "clock", "arguments": '{"zone": "UTC", "at": null}'}
    row = {"messages": [HELLO[0], {"role": "assistant", "content": None, "function_call": call},
                        {"role": "ipython", "content": "9"}, {"role": "assistant", "content": "Nine."}]}  # fmt: skip
    (tmp_path / "a.jsonl").write_text(lines([row]))
    turns = contents(load(str(tmp_path / "a.jsonl"))[0])[0]["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "assistant"]
    assert turns[1]["tool_calls"][0]["function"] == {"name": "clock", "arguments": {"zone": "UTC", "at": None}}


def test_conversations_in_a_table_of_text(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["id", "dialog"], [1, json.dumps(HELLO)], [2, json.dumps(HELLO, indent=1)]])
    [table] = load(str(tmp_path / "a.csv"), columns=("messages=dialog",))
    assert contents(table) == [{"messages": HELLO}] * 2
    (tmp_path / "b.csv").write_text("dialog\nnone\n")
    with refused("b.csv:1: field dialog is 'none'; legal: a list of messages"):
        load(str(tmp_path / "b.csv"), columns=("messages=dialog",))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.parquet", "bom.jsonl", "array.json"])
def test_a_file_without_rows_says_so(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    else:
        raw = {"bom.jsonl": b"\xef\xbb\xbf", "array.json": b"[]"}.get(name, b"")
        path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    with refused(f"{name}: no known form has the columns none.*it has no rows"):
        load(str(path))


def test_one_row_can_be_trained_on_when_none_is_held_out(tmp_path: Path) -> None:
    row = content(CONVERSATIONS["one turn"])
    assert len(loaded(tmp_path, [row]).train) == 1
    with refused("cannot be held out"):
        loaded(tmp_path, [row], eval_share=None)


def test_every_source_is_shown_and_its_weight_said(tmp_path: Path) -> None:
    tokenizer_of(STYLES["chatml"].plain, STYLES["chatml"].specials).save_pretrained(tmp_path / "model")
    row = content(CONVERSATIONS["one turn"])
    (tmp_path / "a.jsonl").write_text(lines([row] * 4))
    (tmp_path / "b.jsonl").write_text(lines([{"text": "One."}] * 4))
    data = SftDataConfig(source=(f"{tmp_path}/a.jsonl=2", f"{tmp_path}/b.jsonl=0.5"), eval_share=0.0)
    num_rows, said = preview(data, ModelConfig(name=str(tmp_path / "model")))
    assert num_rows == 10 and "a.jsonl: messages; 4 rows, each 2 times" in said and "4 rows, each 0.5 times" in said
    assert [line.split(":")[1] for line in said.splitlines() if line.startswith("--- ")] == ["1", "2", "1"]
    assert "[[Hello\nthere<|im_end|>]]" in said and "[[One." in said
