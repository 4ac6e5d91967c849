"""Most memory that the data chapter of pre-training takes, over a text of many gigabytes.

    python benchmarks/pretrain_memory.py                   2 GB; about a quarter of an hour on a core of one's own
    python benchmarks/pretrain_memory.py --gigabytes 0.05

The text, different documents of about 4 KB in JSONL, is written to a temporary folder (--folder says where), tokenised
into a store, and read through once in windows; then all of it is deleted. The peak is of the process (VmHWM of /proc).
What it has after a store of 2 MB, before the large one, is libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adalora_dist.tasks.pretrain.config import PretrainDataConfig
from adalora_dist.tasks.pretrain.store import token_store
from adalora_dist.tasks.rows.bad_rows import BadRows

NUM_WORDS, NUM_PARAGRAPHS = 5_000, 2_000
SMALL_BYTES = 2 << 20


def paragraphs(words: list[str]) -> list[str]:
    dice = random.Random(0)
    return [" ".join(dice.choices(words, k=160)) for _ in range(NUM_PARAGRAPHS)]


def documents(words: list[str]) -> Iterator[str]:
    dice, parts = random.Random(1), paragraphs(words)
    while True:
        yield "\n".join(dice.choices(parts, k=4))


def write_text(path: Path, words: list[str], num_bytes: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for text in documents(words):
            file.write(json.dumps({"text": text}) + "\n")
            if file.tell() >= num_bytes:
                return


def tokenizer_of(words: list[str]) -> PreTrainedTokenizerFast:
    """One token per word."""
    vocabulary = {"</s>": 0, "<unk>": 1} | {word: 2 + number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, help="on a disk with twice the room")
    args = parser.parse_args()
    words = [f"w{number:x}ord" for number in range(NUM_WORDS)]
    tokenizer = tokenizer_of(words)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        os.environ["ADALORA_DIST_CACHE"] = f"{scratch}/cache"
        found = []
        for name, num_bytes in (("small", SMALL_BYTES), ("large", round(args.gigabytes * 1e9))):
            path = Path(scratch) / f"{name}.jsonl"
            write_text(path, words, num_bytes)
            data = PretrainDataConfig(source=(str(path),), eval_share=0.01, max_length=256)
            started = time.process_time()
            store = token_store(data, tokenizer, BadRows("error"), show=False)
            made, seconds = peak_bytes(), time.process_time() - started
            num_tokens = sum(len(row["input_ids"]) for row in store.train)
            found.append((path.stat().st_size, num_tokens, made, seconds, peak_bytes()))
    (_, _, libraries, _, _), (size, num_tokens, made, seconds, read) = found
    print(f"{size:,} bytes of text, {num_tokens:,} tokens, {seconds:.0f} s of processor time for the store")
    print(f"peak with a store of 2 MB: {libraries / 1e6:.0f} MB, with this one: {made / 1e6:.0f} MB")
    print(f"and with all windows read from the mapped store: {read / 1e6:.0f} MB, pages of the file included")


if __name__ == "__main__":
    main()
