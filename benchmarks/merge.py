"""Peak memory and throughput of a merge, on a model made on the spot.

python benchmarks/merge.py --gigabytes 1.2 --shard-megabytes 200

Writes a LLaMA-shaped model with random bf16 weights in several shards and an adapter on every matrix, merges them in a
process of its own, and prints two tables.

Memory is that of the merging process above what it had after its imports, sampled every 2 ms. ``anonymous`` is what it
has allocated. ``file`` is what it has mapped of the shard that it reads: pages of the page cache, which the kernel can
take back, but shown because they count as resident. Their sum is compared with two shards + 300 MB.

Time runs from the first byte read to the last byte on disk (fsync of every file and of the folder), and is compared
with writing the same number of bytes to files of the same sizes, with the same fsync. The base's files are in the page
cache for the merge ("warm"), or dropped from it before (``cold``), as far as the kernel follows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MB = 1e6
HIDDEN, MLP, RANK = 2048, 5632, 8
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 4, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 4, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN), "mlp.down_proj": (HIDDEN, MLP),
}  # fmt: skip


def write_model(folder: Path, num_bytes: float, shard_bytes: float) -> None:
    """Shards with an index and an adapter folder, tensor by tensor, so that this too needs one shard of memory."""
    import torch
    from safetensors.torch import save_file

    from adalora_dist.artifacts.export import save_adapter
    from adalora_dist.methods.update import AdapterWeights

    (folder / "base").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    adapters, weight_map, size, total, layer, number = [], {}, 0, 0, 0, 1

    def flush() -> None:
        nonlocal shard, size, number
        name = f"model-{number:05}.safetensors"
        save_file(shard, folder / "base" / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard, size, number = {}, 0, number + 1

    while total < num_bytes:
        for name, (d_out, d_in) in SHAPES.items():
            full = f"model.layers.{layer}.{name}"
            tensor = torch.randn(d_out, d_in, generator=generator).mul_(0.02).bfloat16()
            if size + tensor.nbytes > shard_bytes and shard:
                flush()
            shard[f"{full}.weight"] = tensor
            size, total = size + tensor.nbytes, total + tensor.nbytes
            p, q = torch.randn(d_out, RANK, generator=generator), torch.randn(RANK, d_in, generator=generator)
            adapters.append(AdapterWeights(full, p, torch.full((RANK,), 1e-3), q, 1.0, False))
        layer += 1
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    save_adapter(adapters, folder / "adapter", str(folder / "base"), None)


def resident() -> tuple[int, int]:
    """(anonymous, file) bytes resident in this process."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))  # type: ignore[return-value]


def merge_and_measure(folder: Path, out: Path, dtype_name: str) -> dict[str, float]:
    """What ``adalora-dist export RUN --to merged`` does, with its memory and time. In its own process."""
    import torch

    from adalora_dist.artifacts.export import merge, read_adapter

    before = resident()
    highest = {"anonymous": 0, "file": 0, "sum": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            anonymous, file = (now - then for now, then in zip(resident(), before, strict=True))
            for name, value in (("anonymous", anonymous), ("file", file), ("sum", anonymous + file)):
                highest[name] = max(highest[name], value)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    adapters = read_adapter(folder / "adapter").adapters
    merge(adapters, folder / "base", out, None if dtype_name == "auto" else getattr(torch, dtype_name))
    merged = time.perf_counter()
    sync(out)
    finished = time.perf_counter()
    done.set()
    watcher.join()
    return {**highest, "seconds": finished - started, "seconds_before_fsync": merged - started}


def sync(folder: Path) -> None:
    """Every file of the folder, and the folder, on the disk."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def raw_write(like: Path, folder: Path) -> float:
    """Seconds to write and fsync files of the sizes that ``like`` has, from one block of random bytes in memory."""
    block = os.urandom(16 << 20)
    sizes = [path.stat().st_size for path in sorted(like.glob("*.safetensors"))]
    folder.mkdir()
    started = time.perf_counter()
    for number, size in enumerate(sizes):
        with (folder / str(number)).open("wb") as file:
            while size:
                size -= file.write(block[: min(size, len(block))])
    sync(folder)
    return time.perf_counter() - started


def drop_from_cache(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def remove(folder: Path) -> None:
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--shard-megabytes", type=float, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        folder, out, dtype_name = arguments.child
        print(json.dumps(merge_and_measure(Path(folder), Path(out), dtype_name)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        write_model(folder, arguments.gigabytes * 1e9, arguments.shard_megabytes * MB)
        sync(folder / "base")
        shards = [path.stat().st_size for path in sorted((folder / "base").glob("*.safetensors"))]
        print(f"{platform.platform()}, {os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}")
        print(f"{sum(shards) / 1e9:.2f} GB in {len(shards)} shards of up to {max(shards) / MB:.0f} MB, bf16\n")
        print("| merged to | cache | anonymous | file | sum | limit: 2 shards + 300 MB |")
        print("| --- | --- | ---: | ---: | ---: | ---: |")
        times: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for dtype_name, cache in (("auto", "warm"), ("auto", "cold"), ("float32", "warm")):
            worst: dict[str, float] = {}
            for _ in range(arguments.rounds):
                out, raw = folder / "out", folder / "raw"
                if cache == "cold":
                    drop_from_cache(folder / "base")
                child = subprocess.run(
                    [sys.executable, __file__, "--child", str(folder), str(out), dtype_name],
                    check=True, stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                measured = json.loads(child.stdout.splitlines()[-1])
                worst = {name: max(value, worst.get(name, 0)) for name, value in measured.items()}
                written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
                largest = max(path.stat().st_size for path in out.glob("*.safetensors"))
                seconds = raw_write(out, raw)
                times.setdefault((dtype_name, cache), []).append((written, measured["seconds"], seconds))
                remove(out)
                remove(raw)
            limit = 2 * largest + 300 * MB
            cells = " | ".join(f"{worst[name] / MB:.0f} MB" for name in ("anonymous", "file", "sum"))
            print(f"| {dtype_name} | {cache} | {cells} | {limit / MB:.0f} MB |", flush=True)
        print("\n| merged to | cache | merge, fsync | raw write, fsync | merge / raw | range |")
        print("| --- | --- | ---: | ---: | ---: | --- |")
        for (dtype_name, cache), rounds in times.items():
            rates = [statistics.median(b / s[i] / MB for b, *s in rounds) for i in (0, 1)]
            ratios = sorted(raw / merged for _, merged, raw in rounds)
            print(
                f"| {dtype_name} | {cache} | {rates[0]:.0f} MB/s | {rates[1]:.0f} MB/s | "
                f"{statistics.median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |"
            )


if __name__ == "__main__":
    main()
