"""``adalora-dist report``: one HTML file about one run or several side by side, which needs no network and no server.

Everything that a run folder says is text in it (``markup.py``), and the page's own rules let nothing run but its own
script: a policy with that script's hash, no image, no font, no connection.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from adalora_dist.artifacts.report.charts import Curve, chart
from adalora_dist.artifacts.report.markup import breakable, folded, lines, mean_and_sd, number, said, table
from adalora_dist.artifacts.report.ranks import expert_maps, frames_of, matrices_table, rank_map
from adalora_dist.artifacts.report.runs import RunRecord, read_runs
from adalora_dist.io.errors import UserError
from adalora_dist.io.marks import is_marked
from adalora_dist.io.progress import duration
from adalora_dist.io.publish import write_whole, writing

_MARK = b'<!doctype html>\n<html lang="en" data-made-by="adalora-dist report">'
"""What every report begins with: a file that does not is somebody's, and stays."""
_SHOWN_SAMPLES = 12
_CURVES = (  # title, unit, metrics (label by name), whether values hold until the next
    ("Training loss", "mean per target token", {"loss": ""}, False),
    ("Budget", "triplets", {"budget": ""}, True),
    ("Ranks", "mean, lowest and highest", {"mean_rank": "mean", "min_rank": "lowest", "max_rank": "highest"}, True),
    ("Importance spread", "sd / mean over matrices", {"importance_spread": ""}, True),
    ("Gradient norm", "before clipping", {"gradient_norm": ""}, False),
    ("Distance from orthogonality", "mean |XᵀX less its diagonal|", {"orthogonality": ""}, False),
    ("Learning rate", "", {"learning_rate": ""}, False),
    ("Speed", "tokens per second", {"tokens_per_second": ""}, False),
    ("Peak memory", "GiB, largest of all processes", {"peak_memory_gib": ""}, False),
)
_DASHES = ("", "7 3", "2 2")


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Read run folders, finished or not, and write the report.

    Args:
        paths: run folders, or folders with one run per seed.
        out: the file; default: report.html in the run's folder, of several runs in the present one. A report that is
            there is replaced.

    Returns:
        The file.

    Raises:
        UserError: a run cannot be read, or ``out`` not be written or is something else than a report.
    """
    runs = read_runs(paths)
    out = out or (runs[0].path if len(runs) == 1 else Path()) / "report.html"
    if out.is_symlink() or (out.exists() and not is_marked(out, _MARK, len(_MARK))):
        raise UserError(f"--out {out} is there and is no report of adalora-dist: give another name, or remove it")
    with writing(out):
        write_whole(out, report(runs))
    return out


def report(runs: Sequence[RunRecord]) -> str:
    """The page of :func:`write_report`."""
    folder = Path(__file__).parent
    script, style = ((folder / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    shown = frames_of(runs)
    frames = json.dumps(shown, separators=(",", ":")).replace("<", "\\u003c")
    title = said(runs[0].label if len(runs) == 1 else f"{len(runs)} runs", 100)
    maps = "".join(rank_map(run, k, shown[k]) for k, run in enumerate(runs))
    chapters = (
        ("Summary", _summary(runs)),
        ("Curves", f'<div class="charts">{"".join(_charts(runs))}</div>'),
        ("Ranks over time", f'<div class="maps">{maps}</div>' if maps else ""),
        ("Experts", "".join(map(expert_maps, runs))),
        ("Matrices", matrices_table(runs)),
        ("Scores", _scores(runs)),
        ("Samples", "".join(_samples(runs))),
        ("Settings", _settings(runs)),
        ("Command", "".join(_commands(runs))),
    )
    body = "".join(
        f'<section aria-labelledby="{name.split()[0].lower()}"><h2 id="{name.split()[0].lower()}">{name}</h2>\n'
        f"{content}</section>\n"
        for name, content in chapters
        if content
    )
    return (
        f'{_MARK.decode()}\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title} – adalora-dist report</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#main">To the report</a>\n<header><h1>{title}</h1></header>\n'
        f'<main id="main">\n{body}</main>\n'
        "<footer>Written by adalora-dist report. This file is complete: it loads nothing.</footer>\n"
        f'<script type="application/json" id="frames">{frames}</script>\n<script>{script}</script>\n</body>\n</html>\n'
    )


# ------------------------------------------------------------------------------------------------------------ chapters


def _summary(runs: Sequence[RunRecord]) -> str:
    rows: dict[str, list[str]] = {}
    for k, run in enumerate(runs):
        facts, loss = run.facts, run.points("loss")
        lowest = min((value for _, value in run.points("eval_loss")), default=None)
        seconds, memory = run.points("seconds"), run.points("peak_memory_gib")
        ranks = list(run.pattern.values())
        parameters = facts.get("num_trainable_parameters")
        triplets = f"{sum(run.initial_ranks.values()):,} at the start, {sum(ranks):,} now" if ranks else None
        num_nonfinite = len(run.metrics) - len(loss)
        model = run.settings.get("model", {}).get("name")
        processes = facts.get("num_processes")
        values = {
            "state": said(run.state),
            "model": breakable(said(model, 80)) if model else None,
            "method": said(facts["method"], 40) if "method" in facts else None,
            "engine": f"{said(facts['engine'], 40)} on {said(processes, 20)}" if "engine" in facts else None,
            "trained parameters": f"{parameters:,}" if isinstance(parameters, int) else None,
            "triplets": triplets,
            "matrices of rank 0": f"{ranks.count(0)} of {len(ranks)}" if ranks else None,
            "last loss": number(loss[-1][1]) if loss else None,
            "steps with a loss that is no number": str(num_nonfinite) if num_nonfinite else None,
            "lowest validation loss": None if lowest is None else number(lowest),
            "training time": duration(seconds[-1][1]) if seconds else None,
            "peak memory": f"{memory[-1][1]:.2f} GiB" if memory else None,
        }
        for name, value in values.items():
            rows.setdefault(name, ["–"] * len(runs))[k] = value or "–"
    told = [[name, *cells] for name, cells in rows.items() if set(cells) != {"–"}]
    caption = "What each run is" if len(runs) > 1 else "What it is"
    return table(caption, ["", *(said(run.label, 60) for run in runs)], told)


def _charts(runs: Sequence[RunRecord]) -> Iterable[str]:
    several = len(runs) > 1
    validation = dict.fromkeys(n for run in runs for record in run.metrics for n in record if n.startswith("eval_"))
    curves = [*_CURVES]
    end = max(run.num_steps_done for run in runs)
    curves[1:1] = [(f"Validation {n[5:45]}", "", {n: ""}, False) for n in list(validation)[:12]]
    for title, unit, names, at_once in curves:
        drawn = [
            Curve(_label(run.label, what, several), run.points(name), k, _DASHES[j])
            for k, run in enumerate(runs)
            for j, (name, what) in enumerate(names.items())
        ]
        yield chart(title, unit, drawn, at_once, end)


def _label(run: str, what: str, several: bool) -> str:
    return f"{run}, {what}" if several and what else what or run


def _scores(runs: Sequence[RunRecord]) -> str:
    keys = dict.fromkeys(
        (subject, name)
        for run in runs for scores in run.results.values() for subject, found in scores.items() for name in found
    )  # fmt: skip
    if not keys:
        return ""
    occasions = list(dict.fromkeys(when for run in runs for when in run.results))
    subjects = list(dict.fromkeys(what for subject, _ in keys for what, _ in subject))
    several = len(runs) > 1
    head = [*map(said, subjects), "score"]
    for when in occasions:
        head += [f"{said(when, 40)}{', ' + said(run.label, 40) if several else ''}" for run in runs]
        head += [f"{said(when, 40)}, mean ± sd"] if several else []
    rows = []
    for subject, name in keys:
        row = [*(dict(subject).get(what, "") for what in subjects), said(name, 60)]
        for when in occasions:
            values = [run.results.get(when, {}).get(subject, {}).get(name) for run in runs]
            known = [value for value in values if value is not None]
            row += [*map(number, values), *([mean_and_sd(known) if len(known) > 1 else "–"] if several else [])]
        rows.append(row)
    return table("Scores on the evaluation data", head, rows)


def _samples(runs: Sequence[RunRecord]) -> Iterable[str]:
    for run in runs:
        if run.samples:
            yield f"<h3>{said(run.label, 60)}</h3>" if len(runs) > 1 else ""
        for position, sample in enumerate(run.samples[:_SHOWN_SAMPLES], start=1):
            entries = "".join(
                f'<dt>{said(what, 60)}</dt><dd class="text">{lines(words or "(empty)")}</dd>'
                for what, words in sample.items()
            )
            heading = "h4" if len(runs) > 1 else "h3"  # below the run's
            yield f"<article><{heading}>Sample {position}</{heading}><dl>{entries}</dl></article>"
        if left := len(run.samples) - _SHOWN_SAMPLES:
            yield f'<p class="soft">{left} more in samples.json.</p>' if left > 0 else ""


def _settings(runs: Sequence[RunRecord]) -> str:
    head = ["setting", *(said(run.label, 60) for run in runs)]
    changed = [run.changed_settings for run in runs]
    names = dict.fromkeys(name for settings in changed for name in settings or {})
    parts = []
    if names:
        rows = [[said(name, 80), *(_setting(run, name) for run in runs)] for name in names]
        parts.append(table("Settings that differ from the recipe's defaults", head, rows))
    untold = [said(run.label, 60) for run in runs if run.changed_settings is None]
    if untold:
        parts.append(
            f'<p class="soft">Which settings differ from the defaults is not recorded: {", ".join(untold)}.</p>'
        )
    every = dict.fromkeys(f"{s}.{key}" for run in runs for s, section in run.settings.items() for key in section)
    rows = [[said(name, 80), *(_setting(run, name) for run in runs)] for name in every]
    if rows:
        parts.append(folded("all settings", table("All settings, resolved", head, rows)))
    return "".join(parts)


def _setting(run: RunRecord, name: str) -> str:
    section, _, key = name.partition(".")
    settings = run.settings.get(section, {})
    if key not in settings:
        return "–"
    value = settings[key]
    words = " ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
    return breakable(said(words or "(empty)", 300))


def _commands(runs: Sequence[RunRecord]) -> Iterable[str]:
    for run in runs:
        if run.command:
            yield (f"<h3>{said(run.label, 60)}</h3>" if len(runs) > 1 else "") + f"<pre>{said(run.command, 4000)}</pre>"
        versions = run.facts.get("versions")
        facts = {"commit": run.facts.get("commit"), "Python": run.facts.get("python")}
        facts |= versions if isinstance(versions, dict) else {}
        if told := ", ".join(f"{said(k, 40)} {said(v, 60)}" for k, v in facts.items() if v is not None):
            yield f'<p class="soft">{told}</p>'
