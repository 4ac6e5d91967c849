"""Reading questions from files and from the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from adalora_dist.tasks.commonsense import hub
from adalora_dist.tasks.commonsense.config import CommonsenseDataConfig
from adalora_dist.tasks.commonsense.prompts import encode_examples
from adalora_dist.tasks.commonsense.rows import find_task, load_task, load_tasks, resolve_tasks
from adalora_dist.tasks.rows.tokens import IGNORED
from tests.support.limits import HANG_SECONDS
from tests.support.paths import ROOT, shared
from tests.support.refusals import refusal
from tests.support.tiny_language_model import byte_tokenizer

QUESTION = {
    "instruction": "Is water wet?\n\nAnswer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}


def write_rows(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# ---- local files


def test_jsonl_and_parquet_give_the_same_examples(tmp_path):
    rows = [QUESTION, QUESTION | {"input": "Ocean water.", "answer": "false", "output": "the correct answer is false"}]
    write_rows(tmp_path / "boolq/train.jsonl", [rows[0], "", rows[1]])
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "boolq/test.parquet"))
    train, test = load_task(str(tmp_path), "boolq", "train"), load_task(str(tmp_path), "boolq", "test")
    assert [e.origin for e in train] == [f"{tmp_path}/boolq/train.jsonl:{row}" for row in (1, 3)]  # blank line counted
    assert [e.origin for e in test] == [f"{tmp_path}/boolq/test.parquet:{row}" for row in (1, 2)]
    for a, b in zip(train, test, strict=True):
        assert (a.instruction, a.input, a.output, a.answer) == (b.instruction, b.input, b.output, b.answer)
        assert a.choices == b.choices == ("true", "false") and a.task == b.task == "boolq"


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ('{"instruction": "Is', ["not valid JSON", "column"]),
        ([1, 2], ["the row is a list", "instruction, input, output, answer"]),
        ({k: v for k, v in QUESTION.items() if k != "input"}, ["field input is missing"]),
        (QUESTION | {"answer": True}, ["field answer is True", "string"]),
        (QUESTION | {"output": None}, ["field output is None", "string"]),
        (QUESTION | {"instruction": "  \n"}, ["field instruction is empty"]),
        (QUESTION | {"answer": "True"}, ["field answer is 'True'", "true, false"]),
        (QUESTION | {"output": "the correct answer is false"}, ["field output", "the correct answer is true"]),
        (QUESTION | {"output": "untrue"}, ["field output", "without the answer"]),
        (QUESTION | {"instruction": "Wet?\n\nAnswer format: true/true"}, ["field instruction", "true/true"]),
        (QUESTION | {"instruction": "Wet?\n\nAnswer format: true"}, ["field instruction", "two or more"]),
    ],
)
def test_a_bad_row_is_refused_by_file_row_and_field(tmp_path, row, parts):
    path = write_rows(tmp_path / "boolq/train.jsonl", [QUESTION, row])
    message = refusal(load_task, str(tmp_path), "boolq", "train")
    assert message.startswith(f"{path}:2: ")
    assert all(part in message for part in parts), message


def test_missing_folders_and_files_are_named_with_what_there_is(tmp_path):
    write_rows(tmp_path / "boolq/train.jsonl", [QUESTION])
    message = refusal(find_task, str(tmp_path), "boolq", "test")
    assert "test.jsonl, test.parquet, validation.jsonl" in message and "tasks in" in message and "boolq" in message
    assert "no train file" in refusal(find_task, str(tmp_path), "piqa", "train")
    assert "no such folder" in refusal(load_task, str(tmp_path / "nowhere"), "boolq", "train")
    assert "no such folder" in refusal(resolve_tasks, CommonsenseDataConfig())
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no task folder" in refusal(resolve_tasks, CommonsenseDataConfig(source=str(empty)))


def test_unreadable_files_are_refused(tmp_path):
    folder = tmp_path / "boolq"
    write_rows(folder / "train.jsonl", [""])
    assert "no rows" in refusal(load_task, str(tmp_path), "boolq", "train")
    (folder / "train.jsonl").write_bytes(b'{"instruction": "\xff"}')
    assert "not UTF-8" in refusal(load_task, str(tmp_path), "boolq", "train")
    (folder / "test.parquet").write_bytes(b"nothing of the sort")
    assert "Parquet" in refusal(load_task, str(tmp_path), "boolq", "test")
    write_rows(folder / "test.jsonl", [QUESTION])
    assert "both test.jsonl and test.parquet" in refusal(load_task, str(tmp_path), "boolq", "test")


def test_dev_rows_stand_in_for_test_rows_and_say_so(tmp_path, caplog):
    write_rows(tmp_path / "boolq/dev.jsonl", [QUESTION])
    assert load_task(str(tmp_path), "boolq", "test")[0].origin.endswith("dev.jsonl:1")
    assert "no test file: evaluating on dev.jsonl" in caplog.text
    caplog.clear()
    write_rows(tmp_path / "boolq/test.jsonl", [QUESTION])
    assert load_task(str(tmp_path), "boolq", "test")[0].origin.endswith("test.jsonl:1")
    assert not caplog.text


def test_tasks_default_to_those_of_the_source_and_every_file_is_looked_for_first(tmp_path):
    for task in ("piqa", "boolq"):
        for split in ("train", "test"):
            row = QUESTION if task == "boolq" else _choice_question("solution", 2)
            write_rows(tmp_path / task / f"{split}.jsonl", [row] * 3)
    config = CommonsenseDataConfig(source=str(tmp_path), max_train_rows=2, max_eval_rows=1)
    train, test = load_tasks(config)
    assert resolve_tasks(config) == ("boolq", "piqa")
    assert [e.task for e in train] == ["boolq", "boolq", "piqa", "piqa"]
    assert {task: len(rows) for task, rows in test.items()} == {"boolq": 1, "piqa": 1}
    (tmp_path / "piqa/test.jsonl").unlink()
    assert "piqa: no test file" in refusal(resolve_tasks, config)
    assert resolve_tasks(CommonsenseDataConfig(source=str(tmp_path), tasks=("boolq",))) == ("boolq",)


def _choice_question(word: str, number: int, answer_format: str = "") -> dict[str, str]:
    answer = f"{word}{number}"
    return {
        "instruction": "Which one?" + answer_format,
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


@pytest.mark.parametrize(
    ("task", "row", "choices"),
    [
        ("arc_easy", _choice_question("answer", 5, "\n\nAnswer format: answer1/answer5"), "answer1 answer5"),
        ("arc_easy", _choice_question("answer", 1, "\n\nAnswer format: answer1/the sea"), "answer1 the_sea"),
        ("piqa", _choice_question("solution", 2), "solution1 solution2"),
        ("siqa", _choice_question("answer", 3), "answer1 answer2 answer3"),
        ("hellaswag", _choice_question("ending", 4), "ending1 ending2 ending3 ending4"),
        ("winogrande", _choice_question("option", 1), "option1 option2"),
    ],
)  # fmt: skip
def test_choices_come_from_the_answer_format_line_or_the_task(tmp_path, task, row, choices):
    write_rows(tmp_path / task / "train.jsonl", [row])
    assert load_task(str(tmp_path), task, "train")[0].choices == tuple(c.replace("_", " ") for c in choices.split())


def test_arc_has_no_fixed_number_of_choices(tmp_path):
    write_rows(tmp_path / "arc_easy/train.jsonl", [_choice_question("answer", 1)])
    assert "no line 'Answer format" in refusal(load_task, str(tmp_path), "arc_easy", "train")


def test_the_reply_of_a_choice_keeps_the_frame(tmp_path):
    row = QUESTION | {"output": "a true story: the correct answer is true."}
    write_rows(tmp_path / "boolq/train.jsonl", [row])
    question = load_task(str(tmp_path), "boolq", "train")[0]
    assert question.output_for("false") == "a true story: the correct answer is false."
    assert question.output_for("true") == question.output


@pytest.mark.parametrize(
    ("task", "num_train", "num_test"), [("arc_easy", 2251, 2376), ("openbookqa", 4957, 500), ("boolq", 3000, 1000)]
)
def test_real_files_load_in_full(task, num_train, num_test):
    source = str(shared("data/commonsense"))
    train, test = load_task(source, task, "train"), load_task(source, task, "test")
    assert (len(train), len(test)) == (num_train, num_test)
    if task == "arc_easy":
        assert {len(e.choices) for e in train} == {3, 4, 5}
    tokenizer = byte_tokenizer()
    for row, question in zip(encode_examples(test[:50], tokenizer, 256), test[:50], strict=True):
        replied = [token for token in row["labels"] if token != IGNORED]
        assert tokenizer.decode(replied) == question.output + "</s>"


# ---- the Hub


LETTERED = {"text": ["snow", "sand ", "sea"], "label": ["A", "B", "C"]}
RAW = {
    "boolq": (
        {"question": "is the sky blue", "passage": "The sky is blue.", "answer": False},
        "Please answer the following question with true or false, question: is the sky blue?"
        "\n\nAnswer format: true/false",
        "false",
        {"answer": None},
    ),
    "piqa": (
        {"goal": "open a jar", "sol1": "twist the lid", "sol2": "sing to it", "label": 0},
        "Please choose the correct solution to the question: open a jar"
        "\n\nSolution1: twist the lid Solution2: sing to it\n\nAnswer format: solution1/solution2",
        "solution1",
        {"label": -1},
    ),
    "siqa": (
        {
            "context": "Ann fell.", "question": "What next?",
            "answerA": "up", "answerB": "cry", "answerC": "fly", "label": "2",
        },
        "Please choose the correct answer to the question: Ann fell. What next?"
        "\n\nAnswer1: up Answer2: cry Answer3: fly\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
        {"label": ""},
    ),
    "hellaswag": (
        {
            "ind": 1, "activity_label": "Baking", "ctx_a": "A man mixes.", "ctx_b": "he", "ctx": "A man mixes. he",
            "endings": ["a", "b", "c", "d"], "source_id": "x", "split": "train", "split_type": "indomain", "label": "3",
        },
        "Please choose the correct ending of the text: Baking: A man mixes. he"
        "\n\nEnding1: a Ending2: b Ending3: c Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending4",
        {"label": ""},
    ),
    "winogrande": (
        {"sentence": "The cup broke as _ fell.", "option1": "the cup", "option2": "the sun", "answer": "1"},
        "Please choose the correct option for the blank _ in the sentence: The cup broke as _ fell."
        "\n\nOption1: the cup Option2: the sun\n\nAnswer format: option1/option2",
        "option1",
        {"answer": ""},
    ),
    "arc_challenge": (
        {"id": "q1", "question": "What is white?", "choices": LETTERED | {"label": ["1", "2", "3"]}, "answerKey": "1"},
        "Please choose the correct answer to the question: What is white?"
        "\n\nAnswer1: snow Answer2: sand Answer3: sea\n\nAnswer format: answer1/answer2/answer3",
        "answer1",
        {"answerKey": "4"},
    ),
    "arc_easy": (
        {"id": "q2", "question": "What is wet?", "choices": LETTERED, "answerKey": "C"},
        "Please choose the correct answer to the question: What is wet?"
        "\n\nAnswer1: snow Answer2: sand Answer3: sea\n\nAnswer format: answer1/answer2/answer3",
        "answer3",
        {"answerKey": ""},
    ),
    "openbookqa": (
        {"id": "q3", "question_stem": "Camels live on", "choices": LETTERED, "answerKey": "B"},
        "Please choose the correct answer to the question: Camels live on"
        "\n\nAnswer1: snow Answer2: sand Answer3: sea\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
        {"answerKey": "E"},
    ),
}  # fmt: skip
EVALUATION_SPLITS = dict.fromkeys(("boolq", "piqa", "siqa", "hellaswag", "winogrande"), "validation") | dict.fromkeys(
    ("arc_easy", "arc_challenge", "openbookqa"), "test"
)


@pytest.mark.parametrize("task", RAW)
def test_a_hub_row_becomes_an_example_and_a_hidden_label_is_refused(task, monkeypatch):
    raw, instruction, answer, hidden = RAW[task]
    asked = []

    def load_dataset(path, name, split, revision):
        asked.append(split)
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = [raw]
    [question] = load_task("hub", task, "test")
    assert (question.instruction, question.input, question.answer) == (instruction, "", answer)
    assert question.output == f"the correct answer is {answer}" and answer in question.choices
    assert asked == [EVALUATION_SPLITS[task]] and question.origin.endswith(f"/{asked[0]}:1")
    rows = [raw, raw | hidden]
    assert f"{asked[0]}:2: the row cannot be used" in refusal(load_task, "hub", task, "test")


def test_all_tasks_are_on_the_hub_under_data_sets_without_scripts():
    assert resolve_tasks(CommonsenseDataConfig(source="hub")) == tuple(hub.HUB_TASKS)
    paths = {task.path for task in hub.HUB_TASKS.values()}
    assert not paths & {"ybisk/piqa", "allenai/social_i_qa", "social_i_qa", "piqa"}  # refused by datasets 5


def test_an_unreachable_hub_points_to_local_files(tmp_path):
    code = (
        "from adalora_dist.tasks.commonsense.rows import load_task\n"
        "from adalora_dist.io.errors import UserError\n"
        "try:\n    load_task('hub', 'arc_easy', 'test')\n"
        "except UserError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    assert "cannot load allenai/ai2_arc/ARC-Easy/test" in line and "FOLDER/arc_easy/train.jsonl" in line


def test_reading_questions_does_not_import_torch():
    code = "import sys, adalora_dist.tasks.commonsense.rows; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=HANG_SECONDS).returncode == 0
