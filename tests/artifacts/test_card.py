"""The model card says what the run's files say, and nothing that they smuggle in."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from adalora_dist.artifacts.hub.card import card_pictures, model_card
from adalora_dist.config.sections import TrainConfig
from adalora_dist.io.markdown import code, fenced, table, text
from adalora_dist.tasks.commonsense.config import CommonsenseConfig
from adalora_dist.training.run_folder import RunFolder
from tests.support.limits import HANG_SECONDS
from tests.support.local_hub import ROOT, TOKEN, write_run

BASE_COMMIT = "c0ffee" * 6 + "c0de"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("card") / "run")


@pytest.fixture()
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def front_matter(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match
    return yaml.safe_load(match[1])


def chapter(card: str, title: str) -> str:
    [found] = re.findall(rf"^## {title}\n\n(.*?)(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)
    return found


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_config(run: Path, section: str, **changes: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config[section] |= changes
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def rewrite_source(run: Path, source: str) -> str:
    set_config(run, "data", source=source)
    return model_card(run)


def test_metadata(run: Path) -> None:
    assert front_matter(model_card(run)) == {
        "base_model": "somebody/a-base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["adalora-dist", "adalora"],
    }


def test_tags_say_the_method(run: Path) -> None:
    for method, tag in (("dora", "dora"), ("lora", "lora"), ("<b>", "adalora"), (None, "adalora"), ([1], "adalora")):
        set_config(run, "adapter", method=method)
        assert front_matter(model_card(run))["tags"] == ["adalora-dist", tag]
    for tasks in (5, "boolq", {"boolq": 1}):
        set_config(run, "data", source="hub", tasks=tasks)
        assert "model-index" not in front_matter(model_card(run))


def test_scores_on_public_data_are_scores_of_the_hub(run: Path) -> None:
    """Those on anything else are in the table alone: nobody could compare them."""
    set_config(run, "data", source="hub", tasks=["boolq", "arc_easy"])
    found = front_matter(model_card(run, repo_id="somebody/a-model"))
    assert found["datasets"] == ["google/boolq", "allenai/ai2_arc"]
    assert (found["language"], found["metrics"]) == ("en", ["accuracy"])
    [model] = found["model-index"]
    [result] = model["results"]
    assert model["name"] == "a-model" and result["task"] == {"type": "text-generation"}
    assert result["dataset"] == {"name": "boolq", "type": "google/boolq", "args": {"rows": "40"}}
    [metric] = result["metrics"]
    assert (metric["type"], metric["value"], metric["name"]) == ("accuracy", 0.825, "accuracy (likelihood)")
    own = front_matter(rewrite_source(run, "/home/somebody/rows"))
    assert not {"datasets", "language", "metrics", "model-index"} & set(own)


@pytest.mark.parametrize(
    ("data", "records", "class_name", "expected"),
    [
        ({"source": "hub", "task": "mrpc"}, {"task": "mrpc", "num_rows": 408, "metrics": {"f1": 0.9, "seconds": 3}},
         "DebertaV2ForSequenceClassification", ("text-classification", ["nyu-mll/glue"], {"f1": 0.9})),
        ({"source": "hub", "task": "v2.0"}, {"exact": 80.5, "f1": 83.0},
         "DebertaV2ForQuestionAnswering",
         ("question-answering", ["rajpurkar/squad_v2"], {"exact_match": 80.5, "f1": 83.0})),
        ({"source": "hub", "task": "xsum"}, {"rouge2": 21.5}, "BartForConditionalGeneration",
         ("summarization", ["EdinburghNLP/xsum"], {"rouge2": 21.5})),
        ({"source": "hub"}, {"bleu": 68.2, "nist": 8.6}, "GPT2LMHeadModel",
         ("text-generation", ["tuetschek/e2e_nlg"], {"bleu": 68.2, "nist_mt": 8.6})),
        ({"source": ["/home/me/a.jsonl", "hub:x/y:train=2"], "columns": []}, {"loss": 1.0}, "LlamaForCausalLM",
         ("text-generation", ["x/y"], {})),
        ({"source": ""}, {"loss": 1.0}, "SomethingNew", (None, None, {})),
    ],
)  # fmt: skip
def test_metadata_of_other_tasks(
    run: Path,
    data: dict[str, Any],
    records: dict[str, Any],
    class_name: str,
    expected: tuple[Any, Any, dict[str, float]],
) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "data": data}))
    rewrite(run / "results.json", before=[], after=[records])
    rewrite(run / "merged" / "config.json", architectures=[class_name])
    found = front_matter(model_card(run))
    results = found.get("model-index", [{"results": []}])[0]["results"]
    metrics = {metric["type"]: metric["value"] for result in results for metric in result["metrics"]}
    assert (found.get("pipeline_tag"), found.get("datasets"), metrics) == expected


def test_no_folder_of_the_machine_is_published(run: Path) -> None:
    secret = ("/home/somebody", "/scratch", "C:\\Users", "~/", "../up")
    set_config(run, "data", source="/home/somebody/rows", chat_template="~/chat.jinja")
    set_config(run, "adapter", init_from="/scratch/adapter")
    set_config(run, "train", resume="../up/run")
    set_config(run, "model", name="C:\\Users\\me\\base")
    command = ["/home/somebody/venv/bin/accelerate", "launch", "recipes/x.py", "--data=/home/somebody/rows", "--model",
               "somebody/a-base", "--output-dir", "/scratch/runs/my run", "~/y"]  # fmt: skip
    rewrite(run / "run.json", launcher_command=command, base_commit=None)
    card = model_card(run, repo_id="somebody/a-model")
    assert not [word for word in secret if word in card]
    made = chapter(card, "How it was made")
    assert "accelerate launch recipes/x.py --data=rows --model somebody/a-base --output-dir 'my run' y\n" in made
    assert "| source | `rows` |" in chapter(card, "Data") and "| init_from | `adapter` |" in chapter(card, "Adapters")


def test_base_results_and_settings(run: Path) -> None:
    card = model_card(run, repo_id="somebody/a-model")
    base = chapter(card, "Base")
    assert f"`somebody/a-base`, revision `{BASE_COMMIT}`" in base and "the base's own weights" in base
    assert "largest difference 0.000123, mean 4.5e-05, largest logit 12.25" in base and "Licence: `apache-2.0`" in base
    assert "| boolq | likelihood | 40 | accuracy | 0.525 | 0.825 |" in chapter(card, "Results")
    config = CommonsenseConfig()
    assert f"| init_rank | `{config.adapter.init_rank}` |" in chapter(card, "Adapters")
    assert f"| learning_rate | `{config.train.learning_rate}` |" in chapter(card, "Training")
    assert f"| max_length | `{config.data.max_length}` |" in chapter(card, "Data")
    facts = json.loads((run / "run.json").read_text())
    made = chapter(card, "How it was made")
    assert "| engine | `fsdp2` |" in made and "| processes | `2` |" in made
    assert Path(facts["command"][0]).name in made and f"| torch | `{facts['versions']['torch']}` |" in made
    assert facts["commit"] in made


def test_ranks_budget_and_pictures(run: Path) -> None:
    pictures = card_pictures(run)
    assert list(pictures) == ["ranks.svg", "history.svg"]
    assert all(content.startswith(b"<?xml") and b"<svg" in content for content in pictures.values())
    assert pictures == card_pictures(run)  # to the byte: a second push of the same run changes nothing
    ranks = chapter(model_card(run, pictures=pictures), "Ranks")
    pattern = json.loads((run / "rank_pattern.json").read_text())
    assert f"{sum(pattern.values())} active triplets in 14 matrices, ranks 0 to 3; 4 matrices need no adapter" in ranks
    assert "(ranks.svg)" in ranks and "(history.svg)" in ranks and "1,234" in ranks
    assert "| 0 | 56 |" in ranks and "| 19 | 37 |" in ranks
    assert "![" not in chapter(model_card(run), "Ranks")


def test_three_lines_to_use_it(run: Path) -> None:
    lines = chapter(model_card(run, repo_id="somebody/a-model", revision="v1"), "Use").splitlines()
    assert [line for line in lines if line] == [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "model = AutoModelForCausalLM.from_pretrained('somebody/a-model', revision='v1')",
        "tokenizer = AutoTokenizer.from_pretrained('somebody/a-model', revision='v1')",
        "```",
    ]


def test_an_adapter(run: Path) -> None:
    (run / "lora").mkdir()
    adapter = {"task_type": None, "base_model_name_or_path": "somebody/a-base"}
    (run / "lora" / "adapter_config.json").write_text(json.dumps(adapter))
    card = model_card(run, run / "lora", "somebody/an-adapter")
    metadata = front_matter(card)
    assert (metadata["library_name"], metadata["base_model_relation"]) == ("peft", "adapter")
    load_base = f"AutoModelForCausalLM.from_pretrained('somebody/a-base', revision='{BASE_COMMIT}')"
    assert f"PeftModel.from_pretrained({load_base}, 'somebody/an-adapter')" in chapter(card, "Use")
    rewrite(run / "run.json", model_class="DebertaV2ForSequenceClassification", base_commit=None)
    (run / "adapter").mkdir()
    task = {"architectures": ["DebertaV2ForSequenceClassification"], "id2label": {"0": "no", "1": "so", "2": "yes"}}
    (run / "adapter" / "task.json").write_text(json.dumps(task))
    load_base = "AutoModelForSequenceClassification.from_pretrained('a-base', num_labels=3)"
    assert load_base in chapter(model_card(run, run / "lora"), "Use")
    assert "Merged" not in chapter(card, "Base") and "Logits" not in chapter(card, "Base")


@pytest.mark.parametrize(
    ("into", "says"), [("original", "the base's own weights"), ("dequantized", "the values that the base has in `nf4`")]
)
def test_a_quantised_run_says_what_it_was_merged_into(run: Path, into: str, says: str) -> None:
    set_config(run, "quantization", quantization="nf4")
    set_config(run, "export", merge_into=into)
    base = chapter(model_card(run), "Base")
    assert "Trained over: the base in `nf4`" in base and f"Merged into: {says}" in base


@pytest.mark.parametrize(
    ("given", "expected", "says"),
    [
        ("MIT", {"license": "mit"}, "`mit`"),
        ("My own, v2", {"license": "other", "license_name": "My own, v2"}, "`My own, v2`"),
        ("", {"license": "unknown"}, "not stated by whoever pushed this"),
    ],
)
def test_licence(run: Path, given: str, expected: dict[str, str], says: str) -> None:
    set_config(run, "export", base_license="")
    card = model_card(run, base_license=given)
    assert {key: value for key, value in front_matter(card).items() if "license" in key} == expected
    assert f"Licence: {says}" in chapter(card, "Base")


def test_a_local_base_goes_by_its_last_name(run: Path) -> None:
    set_config(run, "model", name="/home/somebody/models/my-base")
    rewrite(run / "run.json", base_commit=None, command=["x.py"])
    card = model_card(run)
    assert "`my-base`, a folder" in card and "/home/somebody" not in card
    assert "base_model" not in front_matter(card)


def test_results_of_other_tasks(run: Path) -> None:
    scores = {"task": "mrpc", "num_rows": 408, "metrics": {"f1": 0.9, "accuracy": 0.875}}
    rewrite(run / "results.json", before=[], after=[scores, {"task": "xsum", "rouge2": 21.5}])
    results = chapter(model_card(run), "Results")
    assert "| mrpc | 408 | f1 | 0.9 |" in results and "| xsum |  | rouge2 | 21.5 |" in results


def test_a_run_without_adapters(run: Path) -> None:
    (run / "rank_pattern.json").write_text("{}")
    (run / "allocations.jsonl").unlink()
    assert card_pictures(run) == {} and "## Ranks" not in model_card(run)


def test_what_a_run_does_not_have_is_left_out(run: Path) -> None:
    for name in ("results.json", "rank_pattern.json", "metrics.jsonl", "allocations.jsonl", "verification.json"):
        (run / name).unlink()
    card = model_card(run)
    assert "## Results" not in card and "## Ranks" not in card and "Logits" not in card and card_pictures(run) == {}


HOSTILE = 'x\n---\nlicense: mit\n```\n| <script>alert(1)</script> | [a](javascript:b) `c` "d" \u202e'


@pytest.mark.parametrize("where", ["model", "revision", "license", "repo", "command", "version", "setting", "task"])
def test_nothing_gets_out_of_its_place(run: Path, where: str) -> None:
    honest = model_card(run)
    options: dict[str, Any] = {}
    if where in ("model", "revision"):
        set_config(run, "model", **{"name" if where == "model" else "revision": HOSTILE})
        rewrite(run / "run.json", base_commit=HOSTILE)
    elif where == "license":
        options = {"base_license": HOSTILE}
    elif where == "repo":
        options = {"repo_id": HOSTILE}
    elif where == "command":
        rewrite(run / "run.json", launcher_command=["accelerate", "launch", "x.py", "--model", HOSTILE])
    elif where == "version":
        rewrite(run / "run.json", versions={HOSTILE: HOSTILE}, engine=HOSTILE)
    elif where == "setting":
        set_config(run, "adapter", targets=[HOSTILE], **{HOSTILE: HOSTILE})
    else:
        record = {"task": HOSTILE, HOSTILE: 1.0, "num_rows": 2, "num_correct": 1}
        rewrite(run / "results.json", after=[record], before=[])
    card = model_card(run, **options)
    assert card != honest
    metadata = front_matter(card)
    assert metadata["license"] == ("other" if where == "license" else "apache-2.0")
    assert metadata.keys() <= front_matter(honest).keys() | {"license_name"}
    assert re.findall("^## .*", card, re.MULTILINE) == re.findall("^## .*", honest, re.MULTILINE)
    outside = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", card.partition("\n---\n")[2], flags=re.DOTALL | re.MULTILINE)
    outside = re.sub(r"`[^`\n]*`", "", outside)
    assert not re.search(r"<|\]\((?!https://arxiv)", outside)
    assert "\u202e" not in card


def test_markdown() -> None:
    assert code("a`b|c\nd") == "`a'b/c d`" and text("*a* <b>\n[c](d)") == "a b cd"
    assert fenced("```", "x") == "````x\n```\n````"
    assert table([{"a": "1", "b": ""}, {"a": "2", "b": ""}]) == "| a |\n| --- |\n| 1 |\n| 2 |"


@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed", "torchrun", "other"])
def test_the_command_is_the_one_that_was_typed(run: Path, tmp_path: Path, launcher: str) -> None:
    """A launcher hands on a part of it, and DeepSpeed's a file of its own in between."""
    recipe, program = tmp_path / "recipe.py", tmp_path / "bin" / launcher
    recipe.write_text("import sys, json; from adalora_dist.training.run_folder import _launcher_command\n"
                      "print(json.dumps([_launcher_command(), sys.argv]))\n")  # fmt: skip
    program.parent.mkdir()
    program.write_text("import subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[2:]], check=True)\n")
    command = [sys.executable, str(program), f"--token={TOKEN}", str(recipe), "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS, check=True)
    typed, own = json.loads(done.stdout.splitlines()[-1])
    assert typed == ([launcher, "--token=***", str(recipe), "--seed", "3"] if launcher != "other" else None)
    rewrite(run / "run.json", launcher_command=typed, command=own)
    made = chapter(model_card(run), "How it was made")
    assert f"```bash\n{f'{launcher} --token=***' if typed else 'python'} {recipe.name} --seed 3\n```" in made.replace(
        "'", ""
    )


def test_a_token_on_the_command_line_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x.py", f"--hub-token={TOKEN}"])
    config = CommonsenseConfig(
        train=TrainConfig(output_dir=str(tmp_path / "run")), model={"name": f"https://{TOKEN}@x/y"}
    )
    RunFolder(config, True, {})
    written = "".join(path.read_text() for path in (tmp_path / "run").iterdir())
    assert "--hub-token=***" in written and TOKEN not in written
    (tmp_path / "config.json").write_text("{}")
    assert TOKEN not in model_card(tmp_path / "run", tmp_path)
