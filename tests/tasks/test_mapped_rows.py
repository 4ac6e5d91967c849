"""Passes over rows that lie in mapped files: everything is read, and little of it stays resident."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset

from adalora_dist.io.mapped import release_mapped
from adalora_dist.tasks.rows.table import MAPPED, chunks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere pages are the system's affair alone")

NUM_ROWS, ROW_BYTES = 4000, 10_000


def mapped() -> int:
    """Resident bytes of mapped files."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")]
    return 1024 * int(line.split()[1])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("mapped") / "rows.arrow"
    schema = pyarrow.schema([("row", pyarrow.string())])
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as stream:
        for start in range(0, NUM_ROWS, 500):
            texts = [text_of(number) for number in range(start, start + 500)]
            stream.write_batch(pyarrow.record_batch([texts], schema=schema))
    return Dataset.from_file(str(path))


def text_of(number: int) -> str:
    return f"{number} " + "x" * (ROW_BYTES - 10)


def read(parts: Any, before: int) -> int:
    """The most resident bytes after a part; all rows must be there."""
    most = number = 0
    for part in parts:
        for text in part["row"]:
            assert text == text_of(number)
            number += 1
        most = max(most, mapped() - before)
    assert number == NUM_ROWS
    return most


def test_a_pass_leaves_a_chunk_resident_at_most(rows: Dataset) -> None:
    release_mapped(MAPPED)
    before = mapped()
    assert read(rows.iter(1000), before) > 0.8 * NUM_ROWS * ROW_BYTES  # as it would be
    release_mapped(".of-another-kind")
    assert mapped() - before > 0.8 * NUM_ROWS * ROW_BYTES
    release_mapped(MAPPED)
    assert mapped() - before < 2e6
    assert read(chunks(rows), before) < 1.5 * 1000 * ROW_BYTES
    assert mapped() - before < 2e6
    chosen = rows.select(range(NUM_ROWS - 1, -1, -7))
    for part in chunks(chosen):
        assert [int(text.split()[0]) for text in part["row"]] == list(range(NUM_ROWS - 1, -1, -7))[: len(part["row"])]
