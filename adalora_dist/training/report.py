"""Tables for the end of a run: accuracies, and active ranks by layer and matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adalora_dist.evaluation.results import TaskResult
from adalora_dist.pictures import rank_grid


def accuracy_table(before: Sequence[TaskResult], after: Sequence[TaskResult]) -> str:
    """One line per task and method: rows, majority, accuracy before and after, answers that could not be parsed."""
    old = {(r.task, r.method): r for r in before}
    rows = [("task", "scored by", "rows", "majority", "before", "after", "unparsed")]
    for r in after:
        earlier = old.get((r.task, r.method))
        unparsed = "-" if r.method == "likelihood" else f"{r.num_parse_failures / r.num_rows:.1%}"
        rows.append(
            (r.task, r.method, str(r.num_rows), f"{r.majority:.1%}", f"{earlier.accuracy:.1%}" if earlier else "-",
             f"{r.accuracy:.1%}", unparsed)
        )  # fmt: skip
    return aligned(rows)


def rank_table(pattern: Mapping[str, int]) -> str:
    """Active ranks, layers down and matrices across; names without a layer number get a line of their own."""
    lines, columns, cells = rank_grid(pattern)
    rows = [("layer", *columns, "total")]
    for layer in lines:
        ranks = [cells.get((layer, c)) for c in columns]
        rows.append((layer, *("" if r is None else str(r) for r in ranks), str(sum(r for r in ranks if r is not None))))
    rows.append(("total", *(str(sum(r for (_, c), r in cells.items() if c == column)) for column in columns),
                 str(sum(pattern.values()))))  # fmt: skip
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to equal width, the first flush left, the others flush right."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
