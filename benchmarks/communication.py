"""What adaptive rank adds to communication and memory, counted exactly for LLaMA shapes. No GPU, no processes.

python benchmarks/communication.py        prints the tables of docs/sharding.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from adalora_dist.sharding.spans import FACTORS_OF_MATRIX, Factor, Span, cut_rows

RANK = 12
MODELS = {  # hidden size, MLP size, key-value size, layers
    "LLaMA-7B": (4096, 11008, 4096, 32),
    "Llama-3.1-70B": (8192, 28672, 1024, 80),
}
WORLD_SIZES = (8, 64, 1024)


def factors(hidden: int, mlp: int, key_value: int, num_layers: int) -> list[Factor]:
    """All seven matrices of every layer, at rank RANK."""
    shapes = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    shapes += [(mlp, hidden), (mlp, hidden), (hidden, mlp)]  # (d_out, d_in)
    found, first = [], 0
    for _ in range(num_layers):
        for d_out, d_in in shapes:
            found += [Factor(k, rows, RANK, first) for k, rows in zip(FACTORS_OF_MATRIX, (d_out, d_in), strict=True)]
            first += RANK
    return [*found, Factor("lam", 1, first, 0)]


def spans_by_rows(factor: Factor, world_size: int) -> Iterator[Span]:
    """FSDP2: blocks of ceil(rows / world) rows."""
    block = -(-factor.rows // world_size) * factor.rank
    for rank in range(world_size):
        yield Span(min(rank * block, factor.numel), min((rank + 1) * block, factor.numel))


def spans_by_chunk(factor: Factor, world_size: int) -> Iterator[Span]:
    """ZeRO-3: flat chunks of ceil(numel / world) elements."""
    chunk = -(-factor.numel // world_size)
    for rank in range(world_size):
        yield Span(min(rank * chunk, factor.numel), min((rank + 1) * chunk, factor.numel))


def num_split_rows(all_factors: list[Factor], spans: Callable[[Factor, int], Iterator[Span]], world_size: int) -> int:
    """Rows of P and Q that are cut between ranks."""
    counted: dict[tuple[int, int], int] = {}
    total = 0
    for factor in all_factors:
        if factor.orthogonal:
            key = (factor.rows, factor.rank)
            if key not in counted:
                cut = {fragment.row for span in spans(factor, world_size) for fragment in cut_rows([factor], [span])}
                counted[key] = len(cut)
            total += counted[key]
    return total


def main() -> None:
    for name, sizes in MODELS.items():
        all_factors = factors(*sizes)
        elements = sum(f.numel for f in all_factors)
        orthogonal = [f for f in all_factors if f.orthogonal]
        triplets = all_factors[-1].rank
        grams = 4 * sum(f.rank**2 for f in orthogonal)
        print(f"\n{name}: {len(orthogonal) // 2} matrices, r = {RANK}, {triplets} triplets, {elements:,} elements\n")
        print("| ranks | step, FSDP2 | step, ZeRO-3 | step, ZeRO-1/2 (at most) | allocation | importance per rank |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: |")
        for world_size in WORLD_SIZES:
            rows = [num_split_rows(all_factors, s, world_size) for s in (spans_by_rows, spans_by_chunk)]
            steps = [grams + 4 * RANK * n + 4 for n in (*rows, world_size - 1)]
            cells = [f"{b / 1e6:.2f} MB" for b in steps] + [f"{8 * (triplets + 6) / 1e3:.0f} kB"]
            print(f"| {world_size} | " + " | ".join(cells) + f" | {8 * elements / world_size / 1e6:.2f} MB |")


if __name__ == "__main__":
    main()
