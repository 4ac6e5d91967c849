"""Texts as people keep them: every form is recognised, read, or refused in one line that names file, row and field."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.sft.config import SftConfig, SftDataConfig
from adalora_dist.tasks.sft.demo import demo_conversations, reply_about, ships_of
from adalora_dist.tasks.sft.forms import recognise
from adalora_dist.tasks.sft.rows import load_tables, num_training_rows
from adalora_dist.tasks.sft.sources import Source, parse_source
from tests.support.paths import shared
from tests.support.refusals import refused
from tests.support.sft_rows import HELLO, Row, contents, lines, load

SYSTEM = [{"role": "system", "content": "Be brief."}]
FORMS: dict[str, tuple[Row, Row]] = {
    "messages": ({"messages": HELLO}, {"messages": HELLO}),
    "messages with a system column": ({"system": "Be brief.", "messages": HELLO}, {"messages": SYSTEM + HELLO}),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi – "}, {"type": "text", "text": "é"}]},
                {"role": "assistant", "content": [{"type": "text", "text": HELLO[1]["content"]}]},
            ]
        },
        {"messages": HELLO},
    ),
    "conversations": (
        {"conversations": [{"from": "human", "value": "Hi – é"}, {"from": "gpt", "value": "Hello\r\nthere 日本"}]},
        {"messages": HELLO},
    ),
    "conversations with roles": ({"conversations": HELLO}, {"messages": HELLO}),
    "instruction": (
        {"instruction": "Hi – é", "input": None, "output": "Hello\r\nthere 日本"}, {"messages": HELLO},
    ),
    "instruction and input": (
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"messages": [{"role": "user", "content": "Add.\n\n1 + 1"}, {"role": "assistant", "content": "2"}]},
    ),
    "prompt": ({"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": "1 + 1 =", "completion": " 2"}),
    "prompt of messages": (
        {"prompt": [HELLO[0]], "completion": HELLO[1]}, {"messages": HELLO, "first": 1},
    ),
    "text": ({"text": "One\n and one."}, {"text": "One\n and one."}),
}  # fmt: skip
every_form = pytest.mark.parametrize(("row", "content"), FORMS.values(), ids=FORMS)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADALORA_DIST_CACHE", str(tmp_path / "cache"))


# ------------------------------------------------------------------------------------------------- forms and files


@every_form
@pytest.mark.parametrize(
    "file", ["a.jsonl", "bom.jsonl", "crlf.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.parquet"]
)
def test_every_form_in_every_file(tmp_path: Path, row: Row, content: Row, file: str) -> None:
    rows, path = [row, row], tmp_path / file
    text = json.dumps(rows) if ".json" in file and "jsonl" not in file else lines(rows)
    if file == "crlf.jsonl":
        text = text.replace("\n", "\r\n")
    raw = (b"\xef\xbb\xbf" if file == "bom.jsonl" else b"") + text.encode()
    if file.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(raw) if file.endswith(".gz") else raw)
    said: list[str] = []
    [table] = load(str(path), said=said)
    assert contents(table) == [content, content] and table.content(1)[1] == f"{path}:2"
    assert len(said) == 1 and said[0].startswith(f"{path}: ") and said[0].endswith("2 rows")
    [again] = load(str(path))
    assert again.contents._fingerprint == table.contents._fingerprint  # tokens in the cache are found again


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_tables_of_text(tmp_path: Path, name: str) -> None:
    mark = "\t" if "tsv" in name else ","
    cells = [["instruction", "input", "output"], ['"Say ""hi"",\r\nplease"', "", "hi"], ["Add.", '"1, 1"', "2"]]
    text = "\r\n".join(mark.join(row) for row in cells) + "\r\n\r\n"
    raw = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    [table] = load(str(tmp_path / name))
    assert [turn["content"] for row in contents(table) for turn in row["messages"]] == [
        'Say "hi",\r\nplease', "hi", "Add.\n\n1, 1", "2",
    ]  # fmt: skip


TABLES: dict[str, tuple[bytes, str]] = {
    "semicolons": (b"instruction;output\na;b\n", "separate cells by ','"),
    "two columns of one name": (b"output,output\na,b\n", "two columns are called 'output'"),
    "a missing cell": (b"instruction,output\na,b\nc\n", r"a.csv:2: the row has 1 cells, the header 2"),
    "other letters": (b"instruction,output\na,b\nc,\xe9\n", r"a.csv:2: not UTF-8"),
    "an open quotation": (b'instruction,output\na,"b\n', "not a valid table"),
    "no rows": (b"instruction,output\n", "no known form has the columns none"),
}


@pytest.mark.parametrize(("raw", "reason"), TABLES.values(), ids=TABLES)
def test_tables_that_cannot_be_read(tmp_path: Path, raw: bytes, reason: str) -> None:
    (tmp_path / "a.csv").write_bytes(raw)
    with refused(reason):
        load(str(tmp_path / "a.csv"))


def test_columns_have_other_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"id": 1, "question": "Who?", "answer": "Me."}]))
    said: list[str] = []
    [table] = load(str(tmp_path / "a.jsonl"), columns=("instruction=question,output=answer",), said=said)
    assert [turn["content"] for turn in contents(table)[0]["messages"]] == ["Who?", "Me."]
    assert "(instruction=question, output=answer); columns not used: id" in said[0]
    with refused("no known form has the columns id, question, answer; known are messages; conversations; instruction"):
        load(str(tmp_path / "a.jsonl"))
    with refused("no column reply, which columns gives to output; it has id, question, answer"):
        load(str(tmp_path / "a.jsonl"), columns=("instruction=question", "output=reply"))
    with refused("must be of one form"):
        load(str(tmp_path / "a.jsonl"), columns=("instruction=question", "completion=answer"))
    for wrong in ("instruction", "instrucion=question", "output="):
        with pytest.raises(UserError, match="must be FIELD=COLUMN"):
            SftDataConfig(source=("a.jsonl",), columns=(wrong,))


def test_errors_name_the_users_own_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"q": "Who?", "a": "Me."}, {"q": "Who?", "a": None}]))
    with refused("a.jsonl:2: field a is None"):
        load(str(tmp_path / "a.jsonl"), columns=("prompt=q,completion=a",))


def test_pairs_of_replies_are_named() -> None:
    row = {"question": "Hi", "chosen": "a", "rejected": "b"}
    with refused("pairs of replies: to learn the chosen ones"):
        recognise([row], {}, "a.jsonl")
    reader = recognise([row], {"prompt": "question", "completion": "chosen"}, "a.jsonl")
    assert reader(row, "a.jsonl:1") == {"prompt": "Hi", "completion": "a"}


# ------------------------------------------------------------------------------------------------------- bad rows


def conversation(*contents: Any) -> Row:
    return {"messages": [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(contents)]}


BAD: dict[str, tuple[Any, str]] = {
    "no object": (["a"], "the row is a list"),
    "no messages": ({"messages": None}, "field messages is None"),
    "an empty conversation": ({"messages": []}, r"field messages is \[\]"),
    "a message that is a text": ({"messages": ["Hi"]}, r"field messages\[0\] is 'Hi'"),
    "an unknown role": (
        {"messages": [{"role": "robot", "content": "x"}]},
        r"messages\[0\].role is 'robot'; legal: sys",
    ),
    "an empty reply": (conversation("Hi", "  "), r"messages\[1\].content is '  '; an assistant turn has a text"),
    "no reply": (conversation("Hi"), "no assistant turn"),
    "a null": (conversation("Hi", "Ho", None), r"messages\[2\].content is None; a user turn has a text"),
    "a number": (conversation("Hi", 7), r"messages\[1\].content is 7"),
    "a picture": (conversation([{"type": "image_url", "image_url": "x"}], "Ho"), r"messages\[0\].content\[0\] is"),
    "a surrogate": (conversation("Hi", "\ud800"), r"messages\[1\].content has half of a surrogate pair"),
    "a weight of 0": ({"messages": [HELLO[0], HELLO[1] | {"weight": 0}]}, r"messages\[1\].weight is 0"),
    "tools that are none": ({"messages": HELLO, "tools": "none"}, "field tools is 'none'"),
}


@pytest.mark.parametrize(("row", "reason"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_or_counted(tmp_path: Path, row: Any, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"messages": HELLO}]) + json.dumps(row) + "\n" + lines([{"messages": HELLO}]))
    with refused(f"a.jsonl:2: .*{reason}"):
        load(str(path))
    bad = BadRows("skip")
    [table] = load(str(path), bad=bad)
    assert len(table.contents) == 2 and dict(bad.counts) == {str(path): 1}
    again = BadRows("skip")
    load(str(path), bad=again)  # from the cache
    assert dict(again.counts) == {str(path): 1}


def test_a_line_that_is_no_json_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"text": "a"}]) + '{"text": \n')
    bad = BadRows("skip")
    assert len(load(str(path), bad=bad)[0].contents) == 1 and bad.counts.total() == 1


# ----------------------------------------------------------------------------------------------------------- tools


def test_calls_of_tools() -> None:
    call = json.dumps({"name": "clock", "arguments": {"zone": "UTC"}})
    rows = [("human", "Time?"), ("function_call", call), ("observation", '{"time": 9}'), ("gpt", "Nine.")]
    row = {
        "conversations": [{"from": who, "value": text} for who, text in rows],
        "tools": json.dumps([{"name": "clock", "description": "d", "parameters": {}}]),
    }
    content = recognise([row], {}, "a")(row, "a:1")
    assert [turn["role"] for turn in content["messages"]] == ["user", "assistant", "tool", "assistant"]
    [parsed] = content["messages"][1]["tool_calls"]
    assert parsed["function"] == {"name": "clock", "arguments": {"zone": "UTC"}}
    assert content["messages"][1]["call_text"] == call and content["tools"][0]["function"]["name"] == "clock"
    openai = {"messages": [HELLO[0], {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}]}]}  # fmt: skip
    content = recognise([openai], {}, "a")(openai, "a:1")
    assert content["messages"][1]["tool_calls"] == [parsed | {"id": "c1"}]
    openai["messages"][1]["tool_calls"] = [{"name": "clock"}]
    with refused(r"a:1: field messages\[1\].tool_calls\[0\] is .*legal: a call with function.name"):
        recognise([openai], {}, "a")(openai, "a:1")


# --------------------------------------------------------------------------------------------------------- sources


def test_weights_of_sources(tmp_path: Path) -> None:
    assert parse_source("a.jsonl=2") == Source("a.jsonl", 2.0)
    assert parse_source("hub:a/b:train[:10%]=0.5") == Source("hub:a/b:train[:10%]", 0.5)
    (tmp_path / "year=2024").mkdir()
    assert parse_source(str(tmp_path / "year=2024")).weight == 1
    for wrong in ("a.jsonl=0", "a.jsonl=-1", "a.jsonl=x", "a.jsonl=inf", "a.jsonl=nan", "=2"):
        with refused("the weight .* must be a number > 0"):
            parse_source(wrong)


def test_folders(tmp_path: Path) -> None:
    def written(name: str, *texts: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines({"text": text} for text in texts))

    def texts(folder: str, **settings: Any) -> list[list[str]]:
        data = SftDataConfig(source=(str(tmp_path / folder),), **settings)
        found = load_tables(data, BadRows("error"), lambda line: None)
        return [[row["text"] for table in tables for row in contents(table)] for tables in found]

    written("all/b.jsonl", "b")
    written("all/a.jsonl", "a")
    (tmp_path / "all" / "README.md").write_text("no rows")
    assert texts("all") == [["a", "b"], []]
    written("all/validation.jsonl", "v")
    assert texts("all") == [["a", "b"], ["v"]]
    written("split/train-00000-of-00002.jsonl", "a")
    written("split/train-00001-of-00002.jsonl", "b")
    written("split/test.jsonl", "t")
    written("split/odd.jsonl", "o")
    assert texts("split") == [["a", "b"], ["t"]]
    assert texts("split", eval_split="odd") == [["a", "b"], ["o"]]
    assert texts("split", eval_split=str(tmp_path / "all" / "a.jsonl")) == [["a", "b"], ["a"]]
    assert texts("split", eval_share=0.0) == [["a", "b"], []]
    with refused("eval_split=other: .* has no such split"):
        texts("split", eval_split="other")
    with pytest.raises(UserError, match="leave one out"):
        SftDataConfig(source=("a",), eval_split="odd", eval_share=0.1)


def test_settings_that_nothing_would_read_are_refused() -> None:
    for settings in ({"columns": ("text=a",)}, {"eval_split": "dev"}, {"eval_share": 0.0}):
        with pytest.raises(UserError, match="without data: the built-in conversations have their own"):
            SftDataConfig(**settings)
    with pytest.raises(UserError, match="no row is held out to evaluate on"):
        SftConfig(data={"source": ("a.jsonl",), "eval_share": 0.0}, evaluation={"eval_every": 5})


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.jsonl").write_text("")
    for word, reason in (
        (str(tmp_path / "a.txt"), r"its form is not known by its name; legal: .jsonl"),
        (str(tmp_path / "empty"), "the folder has no files with rows"),
        (str(tmp_path / "missing"), "no such file or folder"),
        ("someone/something", r"the Hub's: --data hub:ID"),
        ("hub:", "names no data set"),
        (str(tmp_path / "none.jsonl"), "no known form has the columns none"),
    ):
        with refused(reason):
            load(word)


def test_rows_of_an_epoch_are_known_before(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines({"text": f"row {number}"} for number in range(40)))
    data = SftDataConfig(source=(f"{tmp_path}/a.jsonl=2.5",), eval_share=0.1)
    tables, eval_tables = load_tables(data, BadRows("error"), lambda line: None)
    assert num_training_rows(tables, eval_tables, data) == 90  # 36 rows are not held out


# --------------------------------------------------------------------------------------------- built-in and real rows


def test_built_in_replies_follow_from_the_timetable() -> None:
    assert not set(ships_of("train")) & set(ships_of("validation"))
    for split in ("train", "validation"):
        for row in demo_conversations(split):
            system, *turns = row["messages"]
            table = {}
            for entry in system["content"].removeprefix("Harbour office. Today: ").rstrip(".").split("; "):
                ship, _, rest = entry.partition(" at ")
                time, _, quay = rest.partition(" from quay ")
                table[ship] = (time, int(quay))
            assert set(table) <= set(ships_of(split))
            for question, reply in zip(turns[::2], turns[1::2], strict=True):
                [ship] = [ship for ship in table if ship in question["content"]]
                assert reply["content"] == reply_about(ship, table[ship])


@pytest.mark.parametrize(
    ("file", "num_rows", "settings"),
    [
        ("alpaca_train.json", 900, {}),
        ("sharegpt_conversations.json", 500, {}),
        ("sharegpt_tools.json", 150, {}),
        ("preferences.jsonl", 150, {"columns": ("prompt=conversations,completion=chosen",)}),
    ],
)
def test_real_rows(file: str, num_rows: int, settings: Row) -> None:
    path = shared(f"data/instruct/{file}")
    bad = BadRows("skip")
    [table] = load(str(path), bad=bad, **settings)
    assert len(table.contents) + bad.counts.total() == num_rows and bad.counts.total() <= 1


def test_rows_that_cannot_be_read_say_so_first(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        load(str(tmp_path / "a.parquet"))
