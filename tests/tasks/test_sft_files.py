"""Files and folders as other tools leave them: Arrow, compressed files, clones, and what cannot be read at all."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.rows.read import file_rows
from tests.support.refusals import refused
from tests.support.sft_rows import HELLO, contents, lines, load

pytestmark = pytest.mark.usefixtures("cache")

ROWS = [{"messages": HELLO}, {"messages": [*HELLO, *HELLO]}]


def zst(path: Path, raw: bytes, *more: bytes) -> None:
    """One frame of Zstandard for each of these."""
    path.write_bytes(b"".join(bytes(pyarrow.compress(part, "zstd", asbytes=True)) for part in (raw, *more)))


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.json.zst", "a.csv.zst", "stream.arrow", "file.arrow", "lz4.arrow"])
def test_files_of_other_tools(tmp_path: Path, name: str) -> None:
    path, table = tmp_path / name, pyarrow.Table.from_pylist(ROWS)
    if name == "a.jsonl.zst":
        zst(path, b"\xef\xbb\xbf" + lines(ROWS[:1]).encode(), lines(ROWS[1:]).encode())
    elif name == "a.json.zst":
        zst(path, json.dumps(ROWS).encode())
    elif name == "a.csv.zst":
        cells = ['"' + json.dumps(row["messages"]).replace('"', '""') + '"' for row in ROWS]
        zst(path, "\r\n".join([" messages ", *cells]).encode())
    else:
        options = pyarrow.ipc.IpcWriteOptions(compression="lz4" if name == "lz4.arrow" else None)
        new = pyarrow.ipc.new_stream if name == "stream.arrow" else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=1)
    [found] = load(str(path))
    assert contents(found) == ROWS and found.content(1)[1] == f"{path}:2"


def test_batches_are_read_in_parts(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [str(number) for number in range(2500)]})
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    found = list(file_rows(tmp_path / "a.arrow"))
    assert [row["text"] for _, row in found] == table["text"].to_pylist()  # type: ignore[index]
    assert found[-1][0].endswith("a.arrow:2500")


@pytest.mark.parametrize("end", ["jsonl.zst", "csv.zst", "arrow"])
@pytest.mark.parametrize("fault", ["cut", "other"])
def test_files_that_are_not_what_they_are_called(tmp_path: Path, end: str, fault: str) -> None:
    path = tmp_path / f"a.{end}"
    text = "text\n" + "a row of some length, at the least\n" * 3000
    if end == "arrow":
        table = pyarrow.table({"text": text.splitlines()})
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        zst(path, text.encode())
    path.write_bytes(path.read_bytes()[:-20] if fault == "cut" else b'{"text": "a"}\n')
    with refused(rf"a.{end}:? (cannot be read|not a readable Arrow file) \(.*again"):
        load(str(path))


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS * 3)
    rows.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict(train=rows, validation=rows.select([0])).save_to_disk(str(tmp_path / "two"))
    datasets.DatasetDict(easy=rows, hard=rows).save_to_disk(str(tmp_path / "three"))
    said: list[str] = []
    [table] = load(str(tmp_path / "one"), said=said)
    assert contents(table) == ROWS * 3
    assert said[0] == f"{tmp_path}/one: all of data-00000-of-00002.arrow, data-00001-of-00002.arrow"
    [table] = load(str(tmp_path / "two"), said=said)
    assert contents(table) == ROWS * 3 and "two/validation/data-00000-of-00001.arrow: messages; 1 rows" in said[-1]
    with refused("three: the folder has no files with rows.*give its folders, as --data .*easy.*it has easy/, hard/"):
        load(str(tmp_path / "three"))
    assert contents(load(str(tmp_path / "three" / "hard"))[0]) == ROWS * 3


def test_clones_of_repositories_and_files_that_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "clone" / "data").mkdir(parents=True)
    (tmp_path / "clone" / "README.md").write_text("# Rows")
    for split in ("train", "test"):
        name = f"clone/data/{split}-00000-of-00001.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / name)
    said: list[str] = []
    [table] = load(str(tmp_path / "clone"), said=said)
    assert contents(table) == ROWS and len(said) == 2 and "data/test-00000-of-00001.parquet: messages" in said[1]
    mixed = tmp_path / "mixed"
    (mixed / "more").mkdir(parents=True)
    for name in ("a.jsonl", "more/b.jsonl", "c.jsonl.bz2"):
        (mixed / name).write_text(lines(ROWS))
    said.clear()
    assert contents(load(str(mixed), said=said)[0]) == ROWS and said[0] == f"{mixed}: not read: c.jsonl.bz2, more/"
    (mixed / "d.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
    said.clear()
    (mixed / "validation.jsonl").write_text(lines(ROWS))
    load(str(mixed), said=said)
    assert said[0] == f"{mixed}: all of a.jsonl, d.jsonl.gz; not read: c.jsonl.bz2, more/"
    load(str(mixed), eval_share=0.0, said=said)
    assert said[-2] == f"{mixed}: all of a.jsonl, d.jsonl.gz; not read: c.jsonl.bz2, more/, validation.jsonl"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (lines([{"text": "é"}]).encode("latin-1"), r"a.jsonl:1: not UTF-8 text \(.*save it as UTF-8"),
        (lines([{"text": "a"}]).encode("utf-16"), "a.jsonl:1: not UTF-8 text"),
        (json.dumps({"text": "a", "id": 1}, indent=1).encode(), "a.jsonl:1: not valid JSON .*one JSON object per line"),
        (b'{"text": "a",\n "id": 1}\n', "a.jsonl:1: not valid JSON .*, the line has an object's beginning alone"),
        (lines([{"text": "a"}] * 3).replace("\n", "\r").encode(), r"a.jsonl:1: not valid JSON \(Extra data"),
        (b"\n" * 30 + b"x\n" * 30, "a.jsonl:31: not valid JSON"),
    ],
)
def test_a_file_of_which_no_row_can_be_read_says_why(tmp_path: Path, raw: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(raw)
    with refused(reason):
        load(str(tmp_path / "a.jsonl"))


def test_rows_behind_many_bad_ones_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("x\n" * 30 + lines(ROWS))
    bad = BadRows("skip")
    assert contents(load(str(tmp_path / "a.jsonl"), bad=bad)[0]) == ROWS and bad.counts.total() == 30


def test_plain_text_has_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n")
    with refused(r'a.txt: its form is not known by its name; .*write {"text": ...} for each text, one per line'):
        load(str(tmp_path / "a.txt"))
