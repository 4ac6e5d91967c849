"""``adalora-dist report``: what the page says, that nothing in a run can act in it, and how a browser shows it."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from adalora_dist.__main__ import main
from adalora_dist.artifacts.report.charts import chart, value_at
from adalora_dist.artifacts.report.page import write_report
from adalora_dist.artifacts.report.ranks import expert_maps, frames_of, rank_map
from adalora_dist.artifacts.report.runs import RunRecord, read_runs
from adalora_dist.artifacts.report.watch import _bars_of, view
from adalora_dist.config.sections import RunConfig
from adalora_dist.io.errors import UserError
from tests.support.browser import CHROMIUM, Browser
from tests.support.limits import HANG_SECONDS
from tests.support.paths import ROOT

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HOSTILE = "</script><script>document.title='taken'</script>\"'><img src=x onerror=\"document.title='taken'\">"


def write_run(path: Path, seed: int = 1, layers: int = 2, steps: int = 40, interval: int = 4, finished: bool = True):
    """A run folder as recipes leave it, with invented numbers."""
    path.mkdir(parents=True)
    draw = random.Random(seed)
    names = [f"model.layers.{layer}.{matrix}" for layer in range(layers) for matrix in MATRICES]
    config = RunConfig().model_dump(mode="json")
    config["train"]["learning_rate"] = 1e-4
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    facts = {
        "engine": "fsdp2", "num_processes": 8, "num_steps": 40, "method": "adalora", "num_trainable_parameters": 4321,
        "initial_ranks": dict.fromkeys(names, 12), "command": ["recipes/llama_sft.py", "--learning-rate", "1e-4"],
        "changed_settings": {"train": {"learning_rate": 1e-4}, "adapter": {"method": "adalora"}},
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(facts))
    strength = [draw.random() for _ in names]
    allocations = []
    for step in range(0, steps, interval):
        ranks = [max(0, min(12, round(12 - 8 * step / steps + 6 * (s - 0.5)))) for s in strength]
        allocations.append({"step": step, "budget": sum(ranks), "lowest_kept_score": 0.1, "pruned": 1, "returned": 0,
                            "ranks": ranks, "importance": [round(s, 4) for s in strength]})  # fmt: skip
    (path / "allocations.jsonl").write_text("".join(json.dumps(a) + "\n" for a in allocations))
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            record: dict[str, Any] = {"step": step, "loss": 2 * math.exp(-step / 10) + draw.random() / 10}
            record |= {"budget": allocations[step // interval]["budget"], "seconds": 2.0 * (step + 1)}
            record |= {"eval_loss": 1.0 / (step + 1)} if step % 10 == 9 else {}
            file.write(json.dumps(record) + "\n")
    if finished:
        scores = {when: [{"task": "boolq", "method": "likelihood", "num_rows": 100, "num_correct": n + seed}]
                  for when, n in (("before", 50), ("after", 80))}  # fmt: skip
        (path / "results.json").write_text(json.dumps(scores))
        samples = [{"prompt": "What is it?", "in the data": "a cat", "before": "", "after": "a cat"}]
        (path / "samples.json").write_text(json.dumps(samples))
    return path


class Page(HTMLParser):
    """Elements with their attributes, and the text in each kind of element."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", [""]
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "wbr":  # a place to break, within a word
            self.text = self.text.removesuffix("\n")
            return
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += "" if self._open[-1] in ("script", "style") else data + "\n"

    def handle_endtag(self, tag: str) -> None:
        if tag == self._open[-1]:
            self._open.pop()

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def test_a_page_says_what_a_run_has_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    main(["report", str(run)])
    assert str(run / "report.html") in capsys.readouterr().out
    page = Page(run / "report.html")
    for said in ("finished, 40 steps", "fsdp2 on 8", "4,321", "Training loss", "Validation loss", "Budget", "boolq",
                 "model.layers.1", "q_proj", "train.learning_rate", "--learning-rate 1e-4", "What is it?", "a cat",
                 "1 min 20 s", "0.51", "0.81"):  # fmt: skip
        assert said in page.text, said
    # Whoever sees no pictures: each has its words, each chart its table, each table a caption and headers.
    drawn = [attributes for tag, attributes in page.elements if tag == "svg" and "aria-hidden" not in attributes]
    assert len(drawn) == 3 and all(a["role"] == "img" and a["aria-label"] for a in drawn)
    assert page.count("caption") == page.count("table") >= 8 and page.count("details") >= 3
    ranks = json.loads((run / "allocations.jsonl").read_text().splitlines()[-1])["ranks"]
    names = list(json.loads((run / "run.json").read_text())["initial_ranks"])
    assert read_runs([run])[0].pattern == dict(zip(names, ranks, strict=True))
    before = (run / "report.html").read_bytes()
    main(["report", str(run)])
    assert (run / "report.html").read_bytes() == before


def test_runs_side_by_side(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"seeds/seed_{seed}", seed) for seed in (1, 2, 3)]
    assert [run.path for run in read_runs([tmp_path / "seeds"])] == folders
    page = Page(write_report([tmp_path / "seeds"], tmp_path / "all.html"))
    assert "0.82 ± 0.01" in page.text and "mean ± sd" in page.text and "seed_2" in page.text
    with pytest.raises(UserError, match="given twice"):
        read_runs([folders[0], folders[0]])


def test_a_run_that_was_interrupted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=20, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss": NaN}\n{"step": 21, "lo')  # a step that was left out; cut off while writing
    page = Page(write_report([run]))
    assert "not finished: 21 of 40 steps so far" in page.text and "steps with a loss that is no number" in page.text
    for name in ("metrics.jsonl", "allocations.jsonl", "run.json"):
        (run / name).unlink()
    assert "Settings" in Page(write_report([run])).text
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match="is no run"):
        write_report([run])


def test_nothing_in_a_run_acts_in_the_page(tmp_path: Path) -> None:
    run = hostile_run(tmp_path)
    page = Page(write_report([run]))
    assert page.count("script") == 2 and page.count("img") == 0
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert HOSTILE[:40] in page.text and "\u202e" not in page.text


def hostile_run(tmp_path: Path) -> Path:
    run = write_run(tmp_path / "hostile")
    facts = json.loads((run / "run.json").read_text())
    for key in ("engine", "num_processes", "method", "commit"):
        facts[key] = HOSTILE
    facts["initial_ranks"] = {f"{HOSTILE}.{k}\u202e": 12 for k in range(14)}
    facts |= {"command": [HOSTILE], "changed_settings": {HOSTILE: {HOSTILE: HOSTILE}}, "versions": {HOSTILE: HOSTILE}}
    (run / "run.json").write_text(json.dumps(facts))
    metrics = {"step": 40, "loss": 1e99, "budget": "x", "seconds": 10**400, f"eval_{HOSTILE}": 1e-99}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics) + "\n" + json.dumps({"step": HOSTILE, "loss": [1]}) + "\n")
    (run / "results.json").write_text(json.dumps({HOSTILE: [{"task": HOSTILE, HOSTILE: 1.0}]}))
    (run / "samples.json").write_text(json.dumps([{HOSTILE: f"{HOSTILE}\n\x1b[31m\u202e{HOSTILE}"}, 3]))
    return run


def test_what_is_no_report_stays(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    mine, link = tmp_path / "mine.html", run / "report.html"
    mine.write_text("<!doctype html>mine")
    link.symlink_to(mine)
    for out in (mine, None, tmp_path):
        with pytest.raises(UserError, match="no report"):
            write_report([run], out)
    assert mine.read_text() == "<!doctype html>mine"
    with pytest.raises(UserError, match="cannot be written"):
        write_report([run], tmp_path / "none" / "report.html")
    (run / "allocations.jsonl").write_text('{"step": 1, "budget": 2, "ranks": [1, -1]}\n')
    with pytest.raises(UserError, match="allocations.jsonl:1"):
        write_report([run])


def test_a_7b_pattern_is_less_than_a_megabyte(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", layers=32, steps=5000, interval=5)
    assert write_report([run]).stat().st_size < 1e6


def test_curves_are_what_was_measured() -> None:
    points = [(float(x), float(x * x)) for x in range(1, 2001)]
    assert value_at(points, 7, exactly=True) == 49 and value_at(points, 7.5, exactly=True) is None
    assert value_at(points, 0, exactly=False) is None and value_at(points, 2001, exactly=False) is None
    from adalora_dist.artifacts.report.charts import Curve

    drawn = chart("Squares", "", [Curve("a", points, 0)])
    assert "from 1 to 4,000,000" in drawn and len(drawn) < 10_000
    short, long = (chart("Short", "", [Curve("a", points[:10], 0)], end=end) for end in (0, 400))
    assert ">400</text>" in long and ">400</text>" not in short  # charts of one page end at one step
    assert chart("Nothing", "", [Curve("a", [], 0)]) == ""
    assert "NaN" not in chart("One", "", [Curve("a", [(5.0, 3.0)], 0), Curve("b", [(5.0, 4.0)], 1)])


def test_a_report_costs_no_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    command = [sys.executable, "-X", "importtime", "-m", "adalora_dist.__main__", "report", str(run)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS, check=True)
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines() if "import time:" in line}
    assert "yaml" in imported and not {"torch", "transformers", "matplotlib"} & imported


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_in_a_browser(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", layers=32, steps=200)
    several = write_report([run, write_run(tmp_path / "b", 2), hostile_run(tmp_path)], tmp_path / "several.html")
    out = write_report([run])
    with Browser() as browser:
        browser.open(out, 1300)
        assert browser.ask("document.querySelectorAll('.ranks b').length") == 224
        last = browser.ask("[...document.querySelectorAll('.ranks b')].map(b => b.textContent).join()")
        browser.ask("{const s = document.querySelector('input[type=range]'); s.value = 0; "
                    "s.dispatchEvent(new Event('input')); 0}")  # fmt: skip
        assert browser.ask("document.querySelector('output').textContent") == "after step 0: 2,688 triplets"
        first = browser.ask("[...document.querySelectorAll('.ranks b')].map(b => b.textContent).join()")
        assert first == ",".join(["12"] * 224) != last
        assert browser.ask("document.querySelector('.ranks b').className") == "s10"
        wide = browser.picture(tmp_path / "wide.png")
        assert wide.startswith(b"\x89PNG") and len(wide) > 50_000
        browser.open(out, 1300, dark=True)
        dark = browser.ask("getComputedStyle(document.body).backgroundColor")
        assert dark == "rgb(20, 22, 26)" and browser.picture(tmp_path / "dark.png") != wide
        browser.open(out, 375)  # the ranks and scores of the matrices are seen without scrolling
        fits = "[...document.querySelectorAll('.names')].map(t => t.scrollWidth <= t.parentElement.clientWidth)"
        assert browser.ask(f"{fits}.join()") == "true,true"
        browser.open(several, 375)
        assert browser.ask("document.documentElement.scrollWidth") <= 375
        browser.picture(tmp_path / "phone.png")
        assert "taken" not in browser.ask("document.title")
        tree = browser.call("Accessibility.getFullAXTree")["nodes"]
        named = {(n["role"]["value"], n.get("name", {}).get("value", "")) for n in tree if "role" in n}
        assert any(role == "slider" and "Allocation" in name for role, name in named)
        assert all(name for role, name in named if role in ("image", "slider", "table", "region"))
        assert browser.complaints == []
        assert {address.split(":")[0] for address in browser.requests} == {"file"}


def test_watching_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", layers=12, steps=20, finished=False)
    main(["watch", str(run)])  # no terminal here: once
    said = capsys.readouterr().out
    for words in ("not finished: 20 of 40", "step 20 of 40, 40 s so far, about 40 s left", "training loss", "budget",
                  "model.layers.11", "after the allocation of step 17", "of 1,008 triplets"):  # fmt: skip
        assert words in said, words
    assert "\x1b" not in said and "nothing new" not in said
    for file in run.iterdir():
        os.utime(file, (1e9, 1e9))
    assert re.match(
        r"run: not finished: 20 of 40 steps so far, nothing new for [\d,]+ h \d\d min\n", view(read_runs([run])[0])
    )
    record = read_runs([run])[0]
    small, coloured = view(record, height=16), view(record, height=16, in_colour=True)
    assert len(small.splitlines()) <= 16 and "more: --once shows all" in small
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == small != coloured
    narrow = view(record, width=50, bars=_bars_of("ascii"))
    assert narrow.partition("Active ranks")[0].isascii() and _bars_of("utf-8") == "▁▂▃▄▅▆▇█"
    assert max(map(len, narrow.splitlines()[3:7])) <= 50 < max(map(len, said.splitlines()[3:7]))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        (run / "results.json").write_text("{}")  # it finishes meanwhile

    monkeypatch.setattr("adalora_dist.artifacts.report.watch.time.sleep", sleep)
    main(["watch", str(run), "--every", "3"])
    assert waits == [3.0] and "finished, 20 steps" in capsys.readouterr().out
    hostile = view(RunRecord.read(hostile_run(tmp_path), "hostile"))
    assert "\x1b" not in hostile and "\u202e" not in hostile
    for words in (["watch", str(tmp_path)], ["watch", str(run), "--every", "0"]):
        with pytest.raises(SystemExit):
            main(words)


def test_the_experts_of_a_layer_are_one_cell(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False)
    names = ["model.layers.0.mlp.experts.0.up", "model.layers.0.mlp.experts.1.up", "model.layers.0.q_proj"]
    (run / "run.json").write_text(json.dumps({"initial_ranks": dict.fromkeys(names, 8)}))
    lines = [{"step": step, "budget": 0, "ranks": ranks} for step, ranks in ((0, [8, 7, 5]), (4, [6, 5, 2]))]
    (run / "allocations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = read_runs([run])[0]
    [shown] = frames_of([record])
    assert [frame["ranks"] for frame in shown] == [[8, 16], [5, 15], [2, 11]]
    cells = re.findall(r'<b data-k="(\d+)" class="s(\d+)">(\d+)</b>', rank_map(record, 0, shown))
    assert sorted((rank, shown[-1]["ranks"][int(k)], shade) for k, shade, rank in cells) == [
        ("11", 11, "7"),
        ("2", 2, "2"),
    ]
    assert "11" in view(record, in_colour=True)
    experts = Page(write_report([run])).text
    assert "active rank of each expert, up, of 6 at most" in experts
    by_expert = re.findall(r'<b class="s(\d+)">(\d+)</b>', expert_maps(record))
    assert by_expert == [("10", "6"), ("9", "5")]


def test_numbers_that_no_run_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", finished=False)
    (run / "metrics.jsonl").write_text('{"step": -7, "loss": 1.0}\n')
    assert "0 of 40 steps" in Page(write_report([run])).text
    (run / "metrics.jsonl").write_text('{"step": 999999999, "loss": 1.0, "seconds": 5}\n')
    (run / "run.json").write_text(f'{{"num_steps": 1{"0" * 400}}}')
    write_report([run])
    assert len(view(read_runs([run])[0]).splitlines()[1]) < 120
    (run / "results.json").write_text(f'{{"after": {{"num_rows": 2, "num_correct": 1{"0" * 400}, "accuracy": 0.5}}}}')
    assert read_runs([run])[0].results == {"after": {(("rows", "2"),): {"accuracy": 0.5}}}
    for command in ("report", "watch"):
        with pytest.raises(SystemExit) as stopped:
            main([command, str(tmp_path / ("x" * 300))])
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
