"""The files that rows of data come in, by the ends of their names."""

from __future__ import annotations

SUFFIXES = (".jsonl", ".parquet", ".json", ".arrow", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
TEXT_TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.zst", ".tsv.zst")
"""With a header; each cell is a text."""
READ = (*SUFFIXES, *TEXT_TABLES)


def names_file(source: str) -> bool:
    """Whether ``data`` names one file of rows, and not a folder of splits or the Hub."""
    return source.endswith(READ)
