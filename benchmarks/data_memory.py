"""What the data chapter of ``recipes/llama_sft.py`` takes in memory, on conversations written for it.

    python benchmarks/data_memory.py                    1 GB of JSON lines in a temporary folder, deleted at the end
    python benchmarks/data_memory.py --megabytes 100

Reads, checks, tokenises (SmolLM2's tokenizer and chat template, fetched once), holds out, and plans batches, with a
cache of its own; then once more from that cache. Prints the most that the process had, above what it had before, of
its own memory and of mapped files (/proc/self/status, every 10 ms). Pages of mapped files are the file cache's: the
system takes them back when it needs them, but whoever looks at RSS sees them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoTokenizer

from adalora_dist.tasks.demo_models.smollm2 import demo_model_folder
from adalora_dist.tasks.rows.bad_rows import BadRows
from adalora_dist.tasks.sft.config import SftDataConfig, SftEvaluationConfig
from adalora_dist.tasks.sft.rows import load_rows

WORDS = "river stone cloud lamp chair spoon engine paper window garden silver letter winter bridge market".split()


def write_rows(path: Path, num_bytes: int) -> int:
    """Conversations of one or two questions, with replies of 1 to 8 kB; how many."""
    draw = random.Random(0)
    sentences = [" ".join(draw.choices(WORDS, k=12)).capitalize() + f" {number}." for number in range(5000)]
    num_rows = written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes:
            turns = []
            for _ in range(draw.randint(1, 2)):
                reply = " ".join(draw.choices(sentences, k=draw.randint(12, 70)))
                turns += [{"role": "user", "content": f"What of {num_rows}?"}, {"role": "assistant", "content": reply}]
            written += file.write(json.dumps({"messages": turns}) + "\n")
            num_rows += 1
    return num_rows


def resident() -> tuple[int, int]:
    """(own, of mapped files), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return tuple(1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))  # type: ignore[return-value]


@contextmanager
def peaks(what: str) -> Iterator[None]:
    """Print the most there was meanwhile, above what there was before."""
    start, most, done = resident(), [0, 0, 0], threading.Event()

    def look() -> None:
        while not done.wait(0.01):
            own, mapped = resident()
            for index, value in enumerate((own - start[0], mapped - start[1], own + mapped - sum(start))):
                most[index] = max(most[index], value)

    thread, seconds = threading.Thread(target=look, daemon=True), time.process_time()
    thread.start()
    yield
    done.set()
    thread.join()
    own, mapped, both = (f"{value / 1e6:,.0f} MB" for value in most)
    print(
        f"{what}: own {own}, mapped files {mapped}, both {both}; {time.process_time() - seconds:,.0f} CPU s", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder(print))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ADALORA_DIST_CACHE"] = f"{folder}/cache"
        path = Path(folder) / "rows.jsonl"
        print(f"{write_rows(path, parser.parse_args().megabytes * 10**6):,} rows, {path.stat().st_size / 1e6:,.0f} MB")
        data = SftDataConfig(source=(str(path),))
        for what in ("first time", "from the cache"):
            with peaks(what):
                rows = load_rows(data, tokenizer, BadRows("error"), print, 0, SftEvaluationConfig())
                rows.plan(16, 0, True)


if __name__ == "__main__":
    main()
