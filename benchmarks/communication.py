"""What adaptive rank adds to communication and memory, counted exactly for LLaMA shapes. No GPU, no processes.

python benchmarks/communication.py        prints the tables of docs/sharding.md
"""

from __future__ import annotations

from adalora_dist.sharding.spans import FACTORS_OF_MATRIX, Factor
from adalora_dist.training.plan.estimate import split_elements

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


def main() -> None:
    for name, sizes in MODELS.items():
        all_factors = factors(*sizes)
        elements = sum(f.numel for f in all_factors)
        orthogonal, triplets = all_factors[:-1], all_factors[-1].rank
        of_block = len(orthogonal) // sizes[-1]
        packed = [orthogonal[first : first + of_block] for first in range(0, len(orthogonal), of_block)]
        alone = [[factor] for factor in orthogonal]
        grams = 4 * sum(f.rank**2 for f in orthogonal)
        print(f"\n{name}: {len(orthogonal) // 2} matrices, r = {RANK}, {triplets} triplets, {elements:,} elements\n")
        print("| ranks | step, FSDP2 and ZeRO-3 | FSDP2, not packed | ZeRO-3, not packed | ZeRO-1/2 (at most) "
              "| allocation | importance per rank |")  # fmt: skip
        print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for world in WORLD_SIZES:
            held = [(packed, "zero3"), (alone, "fsdp2"), (alone, "zero3"), (alone, "zero2")]
            steps = [grams + 4 * split_elements(parameters, engine, world) + 4 for parameters, engine in held]
            cells = [f"{b / 1e6:.2f} MB" for b in steps] + [f"{8 * (triplets + 6) / 1e3:.0f} kB"]
            print(f"| {world} | " + " | ".join(cells) + f" | {8 * elements / world / 1e6:.2f} MB |")


if __name__ == "__main__":
    main()
