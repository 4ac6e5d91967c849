"""Tables of text: aligned columns, and active ranks by layer and matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adalora_dist.artifacts.hub.pictures import of_experts, rank_grid
from adalora_dist.io.errors import printable

_MAX_SHOWN_EXPERTS = 16


def rank_table(pattern: Mapping[str, int]) -> str:
    """Active ranks, layers down and matrices across; names without a layer number get a line of their own."""
    lines, columns, cells = rank_grid(pattern)
    rows = [("layer", *(printable(column, 100) for column in columns), "total")]
    for layer in lines:
        ranks = [cells.get((layer, c)) for c in columns]
        name = printable(layer, 100)
        rows.append((name, *("" if r is None else str(r) for r in ranks), str(sum(r for r in ranks if r is not None))))
    rows.append(("total", *(str(sum(r for (_, c), r in cells.items() if c == column)) for column in columns),
                 str(sum(pattern.values()))))  # fmt: skip
    return aligned(rows) + "".join(f"\n{line}" for line in _expert_lines(pattern))


def _expert_lines(pattern: Mapping[str, int]) -> list[str]:
    """For every layer's experts a line: each one's rank, or how they lie where there are many."""
    lines = []
    for name, ranks in of_experts(pattern).items():
        shown = " ".join(map(str, ranks))
        if len(ranks) > _MAX_SHOWN_EXPERTS:
            at_zero, mean = ranks.count(0), sum(ranks) / len(ranks)
            shown = f"{len(ranks)} experts, {at_zero} at 0, mean {mean:.1f}, largest {max(ranks)}"
        lines.append(f"{printable(name, 100)}: {shown}")
    return ["By expert", *lines] if lines else []


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to equal width, the first flush left, the others flush right."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
