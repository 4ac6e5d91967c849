"""What people's data look like: each input of the tables works, or is refused in one line that says where and why."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
import pytest

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.commonsense.config import CommonsenseDataConfig
from adalora_dist.tasks.commonsense.rows import load_tasks, resolve_tasks
from adalora_dist.tasks.e2e.config import E2EDataConfig
from adalora_dist.tasks.e2e.rows import load_e2e
from adalora_dist.tasks.glue.config import GlueDataConfig
from adalora_dist.tasks.glue.rows import load_glue
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.fields import shown
from adalora_dist.tasks.rows.files import find_split, task_folders
from adalora_dist.tasks.squad.config import SquadDataConfig
from adalora_dist.tasks.squad.rows import load_squad
from adalora_dist.tasks.summarization.config import SummarizationDataConfig
from adalora_dist.tasks.summarization.rows import load_summaries
from tests.support.refusals import refusal

Row = dict[str, Any]


pytestmark = pytest.mark.usefixtures("cache")


@dataclass(frozen=True)
class Task:
    """One of the kinds of data: where rows lie, a good row, one of its texts, and how many training rows are read."""

    folder: str
    test: str
    row: Row
    text: str
    read: Callable[[str, BadRows], int]

    def rows(self, count: int) -> list[Row]:
        return [self.row | ({"id": f"q{number}"} if "id" in self.row else {}) for number in range(count)]

    def load(self, source: str, policy: Literal["error", "skip"]) -> int:
        return self.read(source, BadRows(policy))


def _glue(task: Literal["sst2", "stsb"]) -> Callable[[str, BadRows], int]:
    return lambda source, bad: len(load_glue(GlueDataConfig(source=source, task=task), bad)[0])


TASKS = {
    "commonsense": Task(
        "boolq", "test",
        {"instruction": "Is it?\n\nAnswer format: true/false", "input": "", "output": "it is true", "answer": "true"},
        "instruction",
        lambda source, bad: len(load_tasks(CommonsenseDataConfig(source=source), bad)[0]),
    ),
    "sst2": Task("sst2", "dev", {"sentence": "a fine day", "label": 1}, "sentence", _glue("sst2")),
    "stsb": Task("stsb", "dev", {"sentence1": "a", "sentence2": "b", "label": 2.5}, "sentence2", _glue("stsb")),
    "squad": Task(
        "", "validation",
        {
            "id": "q", "question": "Where?", "context": "Bob lives in Rome.",
            "answers": {"text": ["Rome"], "answer_start": [13]},
        },
        "context",
        lambda source, bad: len(load_squad(SquadDataConfig(source=source), bad)[0]),
    ),
    "summaries": Task(
        "xsum", "test", {"document": "It rained all day.", "summary": "Rain."}, "summary",
        lambda source, bad: len(load_summaries(SummarizationDataConfig(source=source), bad)["train"]),
    ),
    "e2e": Task(
        "", "test", {"mr": "name[Mill]", "ref": "The Mill."}, "ref",
        lambda source, bad: len(load_e2e(E2EDataConfig(source=source), "train", bad)),
    ),
}  # fmt: skip
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def lines(rows: Iterable[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def written(root: Path, task: Task, content: str | bytes, name: str = "train.jsonl") -> str:
    """A source of ``task`` whose training rows are this content."""
    folder = root / "data" / task.folder
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / f"{task.test}.jsonl").write_text(lines(task.rows(2)))
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(root / "data")


# -------------------------------------------------------------------------------------------- files of every task


def _columns(rows: list[Row]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


FILES: dict[str, Callable[[list[Row]], dict[str, bytes]]] = {
    "lines": lambda rows: {"train.jsonl": lines(rows).encode()},
    "lines with a byte order mark": lambda rows: {"train.jsonl": b"\xef\xbb\xbf" + lines(rows).encode()},
    "lines that end as in Windows": lambda rows: {"train.jsonl": lines(rows).replace("\n", "\r\n\r\n").encode()},
    "lines without a last end": lambda rows: {"train.jsonl": lines(rows).rstrip("\n").encode()},
    "compressed lines": lambda rows: {"train.jsonl.gz": gzip.compress(lines(rows).encode())},
    "an array": lambda rows: {"train.json": json.dumps(rows).encode()},
    "an indented array with a byte order mark": lambda rows: {
        "train.json": b"\xef\xbb\xbf\n " + json.dumps(rows, indent=1).encode()
    },
    "lines in .json": lambda rows: {"train.json": lines(rows).encode()},
    "a compressed array": lambda rows: {"train.json.gz": gzip.compress(json.dumps(rows).encode())},
    "Parquet": lambda rows: {"train.parquet": _columns(rows)},
    "a folder of Parquet": lambda rows: {
        "train/a.parquet": _columns(rows[:1]), "train/b.parquet": _columns(rows[1:]), "train/_SUCCESS": b""
    },
    "a folder of lines": lambda rows: {
        "train/0.jsonl": lines(rows[:2]).encode(), "train/1.jsonl": lines(rows[2:]).encode()
    },
    "shards": lambda rows: {
        "train-00000-of-00002.parquet": _columns(rows[:2]), "train-00001-of-00002.parquet": _columns(rows[2:])
    },
    "shards of lines": lambda rows: {
        f"train-{k}-of-3.jsonl.gz": gzip.compress(lines([rows[k]]).encode()) for k in range(3)
    },
    "further fields, some odd": lambda rows: {
        "train.jsonl": lines(row | {"i": float("nan"), "m": [[[[None]]]], "x\ud800": "\0"} for row in rows).encode()
    },
}  # fmt: skip


@every_task
@pytest.mark.parametrize("kind", FILES)
def test_files_that_can_be_read(tmp_path: Path, task: Task, kind: str) -> None:
    source = written(tmp_path, task, b"", "unused.txt")
    for name, content in FILES[kind](task.rows(3)).items():
        path = tmp_path / "data" / task.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert task.load(source, "error") == 3


NO_FILES: dict[str, tuple[str, Callable[[list[Row]], bytes], str]] = {
    "empty": ("train.jsonl", lambda rows: b"", "train.jsonl cannot be read: it has no rows"),
    "blank lines": ("train.jsonl", lambda rows: b"\n\r\n \n", "it has no rows"),
    "empty array": ("train.json", lambda rows: b"[]", "it has no rows"),
    "empty .json": ("train.json", lambda rows: b"", "it has no rows"),
    "cut off array": ("train.json", lambda rows: json.dumps(rows).encode()[:-9], "train.json is not valid JSON"),
    "array that is not UTF-8": ("train.json", lambda rows: b'["\xff"]', "is not UTF-8 text"),
    "array without end": ("train.json", lambda rows: b"[" * 100_000, "train.json is no"),
    "one object": ("train.json", lambda rows: json.dumps({"data": rows}, indent=1).encode(), "train.json:1: not valid"),
    "UTF-16": ("train.jsonl", lambda rows: lines(rows).encode("utf-16"), "train.jsonl:1: not UTF-8"),
    "not compressed": ("train.jsonl.gz", lambda rows: lines(rows).encode(), "train.jsonl.gz cannot be read"),
    "cut off": ("train.jsonl.gz", lambda rows: gzip.compress(lines(rows).encode())[:-12], "cannot be read"),
    "no Parquet": ("train.parquet", lambda rows: b"PAR1 of a kind", "not a readable Parquet file"),
    "empty Parquet": ("train.parquet", lambda rows: b"", "not a readable Parquet file"),
    "no rows": ("train.parquet", lambda rows: _columns(rows[:0]), "it has no rows"),
    "comma-separated": ("train.csv", lambda rows: b"a,b\n1,2\n", "train.csv"),
    "a missing shard": ("train-00001-of-00002.parquet", _columns, "number 0 is missing"),
    "an empty folder": ("train/README.md", lambda rows: b"", "none of train.jsonl"),
}


@every_task
@pytest.mark.parametrize("kind", NO_FILES)
def test_files_that_cannot_be_read(tmp_path: Path, task: Task, kind: str) -> None:
    name, content, says = NO_FILES[kind]
    source = written(tmp_path, task, content(task.rows(3)), name)
    message = refusal(task.load, source, "error")
    assert says in message and str(tmp_path) in message and len(message) < 600, message
    assert str(tmp_path) in refusal(task.load, source, "skip")


@every_task
def test_a_split_in_two_forms(tmp_path: Path, task: Task) -> None:
    source = written(tmp_path, task, lines(task.rows(3)))
    written(tmp_path, task, json.dumps(task.rows(1)), "train.json")
    assert "both train.jsonl and train.json exist" in refusal(task.load, source, "error")
    (tmp_path / "data" / task.folder / "train.jsonl").unlink()
    written(tmp_path, task, lines(task.rows(1)), "train/0.jsonl")
    assert "both train.json and train/0.jsonl exist" in refusal(task.load, source, "error")
    (tmp_path / "data" / task.folder / "train.json").unlink()
    written(tmp_path, task, _columns(task.rows(1)), "train/0.parquet")
    assert "both train/0.jsonl and train/0.parquet exist" in refusal(task.load, source, "error")


# --------------------------------------------------------------------------------------------- rows of every task

TEXTS: dict[str, Any] = {
    "null": None, "number": 7, "not a number": float("nan"), "truth": True, "list": ["a"], "object": {"a": "b"},
    "empty": "", "blank": " \n\t\u00a0", "half a pair": "a \ud83d b", "other half": "\udc00", "NUL": "a\0b",
}  # fmt: skip
ROWS: dict[str, object] = {
    "list": [1, 2], "text": "row", "number": 1.5, "null": None, "nothing in it": {}, "other names": {"a\ud800": 1},
}  # fmt: skip
RAW = {
    "cut off": b'{"a": ',
    "two on a line": b"{}{}",
    "not UTF-8": b'{"a": "\xff"}',
    "deep": b"[" * 100_000,
    "long number": b'{"label": ' + b"9" * 10_000 + b"}",
    "words": b"not JSON at all",
}


def bad_rows_of(task: Task) -> dict[str, bytes]:
    rows = {f"{task.text} {kind}": task.row | {task.text: value} for kind, value in TEXTS.items()}
    rows["without " + task.text] = {name: value for name, value in task.row.items() if name != task.text}
    encoded = {kind: json.dumps(row).encode() for kind, row in (rows | ROWS).items()} | RAW
    return {kind: row.replace(b'"q"', b'"its own"') for kind, row in encoded.items()}


@every_task
def test_a_row_that_cannot_be_used_is_named_or_left_out(tmp_path: Path, task: Task) -> None:
    file = tmp_path / "data" / task.folder / "train.jsonl"
    for kind, row in bad_rows_of(task).items():
        good = [json.dumps(row).encode() for row in task.rows(3)]
        source = written(tmp_path, task, b"\n".join([*good[:2], row, good[2]]) + b"\n")
        message = refusal(task.load, source, "error")
        assert message.startswith(f"{file}:3: ") and len(message) < 500, (kind, message)
        assert message.isascii(), (kind, message)
        if kind.startswith((task.text, "without")):
            assert f"field {task.text} " in message, (kind, message)
        assert task.load(source, "skip") == 3, kind
    everything = b"\n".join([*bad_rows_of(task).values(), *good])
    assert task.load(written(tmp_path, task, everything), "skip") == 3
    assert "no usable rows" in refusal(task.load, written(tmp_path, task, b"\n".join(RAW.values())), "skip")


@every_task
def test_bad_rows_in_parquet(tmp_path: Path, task: Task) -> None:
    rows = task.rows(4)
    rows[1] = rows[1] | {task.text: None}
    rows[2] = rows[2] | {task.text: "a\0"}
    source = written(tmp_path, task, _columns(rows), "train.parquet")
    assert f"train.parquet:2: field {task.text} is None" in refusal(task.load, source, "error")
    assert task.load(source, "skip") == 2


def test_parquet_text_that_is_not_unicode(tmp_path: Path) -> None:
    raw = pyarrow.array([b"fine", b"\xff\xfe", b"fine too"], pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(3, *raw.buffers()[1:])
    table = pyarrow.table({"sentence": text, "label": pyarrow.array([0, 1, 1])})
    task = TASKS["sst2"]
    source = written(tmp_path, task, b"", "train.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "data" / "sst2" / "train.parquet")
    assert "train.parquet:2: not UTF-8 text" in refusal(task.load, source, "error")
    assert task.load(source, "skip") == 2


@every_task
def test_rows_left_out_are_counted_by_file_each_time(tmp_path: Path, task: Task) -> None:
    """Also where a checked copy of the rows is in the cache, and whatever characters the path has."""
    source = written(tmp_path / "a:1 [x]*?", task, lines([*task.rows(2), 7, 8]))
    file = tmp_path / "a:1 [x]*?" / "data" / task.folder / "train.jsonl"
    for _ in range(2):
        bad = BadRows("skip")
        assert task.read(source, bad) == 2
        assert bad.counts == {str(file): 2} and str(file) in (bad.summary() or "")


# ------------------------------------------------------------------------------------------ values that have a range

LABELS: list[tuple[str, object, str | None]] = [
    ("sst2", 0, None), ("sst2", 1.0, None), ("sst2", -1, "legal: 0 to 1; test sets have no labels"),
    ("sst2", 2, "label is 2;"), ("sst2", 0.5, "label is 0.5"), ("sst2", "1", "label is '1'"), ("sst2", None, "is None"),
    ("sst2", True, "label is True"), ("sst2", float("nan"), "label is nan"), ("sst2", [1], "label is [1]"),
    ("sst2", 10**400, "label is 1000"), ("stsb", 0, None), ("stsb", 5, None), ("stsb", 3.75, None),
    ("stsb", float("nan"), "label is nan; legal: 0 to 5"), ("stsb", float("inf"), "label is inf"),
    ("stsb", -float("inf"), "label is -inf"), ("stsb", -1, "label is -1"), ("stsb", 5.01, "label is 5.01"),
    ("stsb", 10**400, "legal: 0 to 5"), ("stsb", "4.2", "label is '4.2'"), ("stsb", None, "is None"),
    ("stsb", False, "label is False"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "label", "says"), LABELS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("split", ["train", "dev"])
def test_labels(tmp_path: Path, name: str, label: object, says: str | None, split: str) -> None:
    task = TASKS[name]
    source = written(tmp_path, task, lines(task.rows(3)))
    (tmp_path / "data" / name / f"{split}.jsonl").write_text(lines([*task.rows(3), task.row | {"label": label}]))
    if says is None:
        assert task.load(source, "error") == (4 if split == "train" else 3)
        return
    message = refusal(task.load, source, "error")
    assert f"{split}.jsonl:4: field label is " in message and says in message and len(message) < 400
    assert task.load(source, "skip") == 3


def test_an_evaluation_set_without_labels_is_refused(tmp_path: Path) -> None:
    task = TASKS["sst2"]
    source = written(tmp_path, task, lines(task.rows(3)))
    (tmp_path / "data" / "sst2" / "dev.jsonl").write_text(lines([task.row | {"label": -1}] * 2))
    assert "test sets have no labels" in refusal(task.load, source, "error")
    assert "no usable rows (2 left out)" in refusal(task.load, source, "skip")


ANSWERS: list[tuple[object, str | None]] = [
    ({"text": ["Rome"], "answer_start": [13]}, None),
    ({"text": ["Rome", "in Rome"], "answer_start": [13, 10]}, None),
    ({"text": ["Rome"], "answer_start": [13], "more": 1}, None),
    ({"text": ["Rome"], "answer_start": [-5]}, "does not start at character -5"),
    ({"text": ["Rome"], "answer_start": [99]}, "does not start at character 99"),
    ({"text": ["Rome"], "answer_start": [12]}, "does not start at character 12"),
    ({"text": ["Oslo"], "answer_start": [13]}, "'Oslo' does not start"),
    ({"text": ["Rome"], "answer_start": [13.0]}, "start 13.0"),
    ({"text": ["Rome"], "answer_start": ["13"]}, "start '13'"),
    ({"text": ["Rome"], "answer_start": [None]}, "start None"),
    ({"text": ["Rome"], "answer_start": [True]}, "start True"),
    ({"text": ["Rome"], "answer_start": []}, "the same length"),
    ({"text": ["Rome"], "answer_start": 13}, "two lists"),
    ({"text": "Rome", "answer_start": [13, 14, 15, 16]}, "two lists"),
    ({"text": [None], "answer_start": [13]}, "text None"),
    ({"text": [""], "answer_start": [13]}, "text ''"),
    ({"text": [" "], "answer_start": [3]}, "text ' '"),
    ({"text": ["\ud800"], "answer_start": [3]}, "surrogate"),
    ({"text": [], "answer_start": []}, "--task v2.0"),
    ({"text": ["Rome"]}, "lists text and answer_start"),
    ([], "lists text and answer_start"),
    ("Rome", "lists text and answer_start"),
    (None, "lists text and answer_start"),
]


@pytest.mark.parametrize(("answers", "says"), ANSWERS, ids=str)
def test_answers(tmp_path: Path, answers: object, says: str | None) -> None:
    task = TASKS["squad"]
    source = written(tmp_path, task, lines([*task.rows(3), task.row | {"answers": answers}]))
    if says is None:
        assert task.load(source, "error") == 4
        return
    message = refusal(task.load, source, "error")
    assert "train.jsonl:4: " in message and says in message and message.isascii()
    assert task.load(source, "skip") == 3


def test_questions_have_ids_of_their_own(tmp_path: Path) -> None:
    """Predictions are filed by id: one of two would be lost."""
    task = TASKS["squad"]
    source = written(tmp_path, task, lines([*task.rows(3), task.rows(2)[1]]))
    assert "train.jsonl:4: field id is 'q1', that of an earlier row" in refusal(task.load, source, "error")
    assert task.load(source, "skip") == 3


CHOICES: list[tuple[Row, str | None]] = [
    ({"answer": "false", "output": "it is false"}, None),
    ({"instruction": "Is it?\r\n\r\nAnswer format: true/false\r\n"}, None),
    ({"answer": "", "output": "it is "}, "field answer is ''"),
    ({"answer": "True"}, "field answer is 'True'; legal: true, false"),
    ({"answer": "2"}, "field answer is '2'"),
    ({"answer": -1}, "field answer is -1"),
    ({"answer": None}, "field answer is None"),
    ({"input": None}, "field input is None"),
    ({"output": "untrue"}, "without the answer"),
    ({"output": "it is true\0"}, "field output has a NUL"),
    ({"instruction": "Is it?\n\nAnswer format: true/true"}, "true/true"),
    ({"instruction": "Is it?\n\nAnswer format: true/"}, "two or more names"),
    ({"instruction": "Is it?\n\nAnswer format: true / false"}, "field answer is 'true'"),
]


@pytest.mark.parametrize(("changes", "says"), CHOICES, ids=str)
@pytest.mark.parametrize("split", ["train", "test"])
def test_multiple_choice(tmp_path: Path, changes: Row, says: str | None, split: str) -> None:
    task = TASKS["commonsense"]
    source = written(tmp_path, task, lines(task.rows(3)))
    (tmp_path / "data" / "boolq" / f"{split}.jsonl").write_text(lines([*task.rows(3), task.row | changes]))
    if says is None:
        task.load(source, "error")
        return
    message = refusal(task.load, source, "error")
    assert f"{split}.jsonl:4: field " in message and says in message
    assert task.load(source, "skip") == 3


# ------------------------------------------------------------------------------------------------------------- paths


@every_task
@pytest.mark.parametrize(
    "name", ["news[1]", "n*", "n?ws", "{a,b}", "[!x]", "a::b", "label=1", "**", "a b", "\u00e9\u4e2d"]
)
def test_a_path_is_no_pattern(tmp_path: Path, task: Task, name: str) -> None:
    for sibling in ("news1", "news", "a", "b", "n"):
        written(tmp_path / sibling, task, lines(task.rows(7)))
    assert task.load(written(tmp_path / name, task, lines(task.rows(3))), "error") == 3
    assert task.load(written(tmp_path / f"{name}-parquet", task, _columns(task.rows(4)), "train.parquet"), "error") == 4


def test_task_folders_as_others_spell_them(tmp_path: Path) -> None:
    names = ["ARC-Easy", "ARC-Challenge", "social_i_qa", "winogrande", "openbookqa", "hellaswag", "boolq", "piqa"]
    for name in [*names, "gsm8k", ".git"]:
        task = TASKS["commonsense"]
        for split in ("train", "test"):
            written(tmp_path, task, json.dumps(task.rows(2)), f"../{name}/{split}.json")
    (tmp_path / "data" / "boolq" / "test.jsonl").unlink()
    source = str(tmp_path / "data")
    assert len(resolve_tasks(CommonsenseDataConfig(source=source))) == 8
    train, test = load_tasks(CommonsenseDataConfig(source=source, tasks=("siqa", "arc_easy")))
    assert list(test) == ["siqa", "arc_easy"] and {row.task for row in train} == set(test)
    (tmp_path / "data" / "arc_easy").mkdir()
    message = refusal(resolve_tasks, CommonsenseDataConfig(source=source))
    assert "both ARC-Easy and arc_easy hold arc_easy" in message
    for name, task_name in (("SST-2", "sst2"), ("STS-B", "stsb"), ("XSum", "xsum"), ("cnn-dailymail", "cnn_dailymail")):
        (tmp_path / "others" / name).mkdir(parents=True)
        assert task_folders(str(tmp_path / "others"), (task_name,))[task_name].name == name


def test_stand_ins_for_test_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "validation-00000-of-00001.parquet").write_bytes(_columns(TASKS["e2e"].rows(2)))
    assert len(load_e2e(E2EDataConfig(source=str(tmp_path)), "test")) == 2
    assert "evaluating on validation-00000-of-00001.parquet" in caplog.text


def test_shards_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(11):
        (tmp_path / f"train-{number}-of-11.jsonl").write_text("{}\n")
    assert [path.name for path in find_split(tmp_path, ("train",)).files][1:3] == [
        "train-1-of-11.jsonl", "train-2-of-11.jsonl"
    ]  # fmt: skip
    (tmp_path / "train-11-of-11.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="of its 11 shards 12 are there"):
        find_split(tmp_path, ("train",))


def test_what_is_shown_is_short_and_plain() -> None:
    deep: Any = []
    for _ in range(500):
        deep = [deep]
    for value in (deep, "x" * 10**6, 10**4000, {"\ud800": "\n\x1b[2J"}, [float("nan")] * 10**5, b"\xff" * 1000):
        text = shown(value)
        assert len(text) < 200 and text.isascii() and text.isprintable()
