"""Tasks of one's own: rows under any name, columns of other names, one file, and the rows that are held out of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.commonsense.config import CommonsenseDataConfig
from adalora_dist.tasks.commonsense.rows import load_tasks, load_tasks_and_validation, resolve_tasks
from adalora_dist.tasks.e2e.config import E2EDataConfig
from adalora_dist.tasks.e2e.rows import load_e2e_parts
from adalora_dist.tasks.glue.config import GlueConfig, GlueDataConfig
from adalora_dist.tasks.glue.rows import load_glue_rows
from adalora_dist.tasks.rows.public import PUBLIC_ROWS, count_rows
from adalora_dist.tasks.squad.config import SquadDataConfig
from adalora_dist.tasks.squad.rows import load_squad_parts
from adalora_dist.tasks.summarization.config import SummarizationDataConfig
from adalora_dist.tasks.summarization.rows import load_summaries
from tests.support.refusals import refused


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADALORA_DIST_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------------ classification


def test_classes_are_those_of_the_training_rows(tmp_path: Path) -> None:
    rows = [{"text": f"mail {n}", "label": name} for n, name in enumerate(["spam", "work", "äpfel", "spam", "work"])]
    write(tmp_path / "topics" / "train.jsonl", rows)
    write(tmp_path / "topics" / "dev.jsonl", rows[1:3])
    loaded = load_glue_rows(GlueDataConfig(source=str(tmp_path), task="topics"))
    assert loaded.task.classes == ("spam", "work", "äpfel") and loaded.task.num_labels == 3
    assert loaded.task.metrics == ("accuracy", "macro_f1", "matthews") and loaded.validation is None
    assert [row.label for row in loaded.train] == [0, 1, 2, 0, 1]
    assert {name: [row.label for row in part] for name, part in loaded.sets.items()} == {"dev": [1, 2]}
    write(tmp_path / "topics" / "dev.jsonl", [{"text": "a", "label": "play"}])
    with refused("dev.jsonl:1: field label is 'play', which no training row has; legal: spam, work"):
        load_glue_rows(GlueDataConfig(source=str(tmp_path), task="topics"))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([10, 9, 2], ("2", "9", "10")),
        ([True, False, True], ("False", "True")),
        (["10", "9"], ("9", "10")),
        ([1.0, 2.0], ("1", "2")),
        ([-1, 1], ("-1", "1")),
        (["1", "01"], ("01", "1")),  # two classes, in an order that no process has for itself
        (["--1", "2"], ("--1", "2")),
        (["1.0", "0.0", 10], ("0", "1", "10")),  # pandas writes so where a label was missing
        (["1.5", "two"], ("1.5", "two")),
    ],
)
def test_labels_of_every_kind(tmp_path: Path, labels: list[Any], classes: tuple[str, ...]) -> None:
    file = write(tmp_path / "any name.jsonl", [{"text": f"row {n}", "label": x} for n, x in enumerate(labels * 9)])
    loaded = load_glue_rows(GlueDataConfig(source=file, task="own", eval_share=0.1))
    assert loaded.task.classes == classes
    assert all(loaded.task.classes[int(row.label)] == row.name for row in [*loaded.train, *loaded.sets["dev"]])
    assert loaded.validation == loaded.sets["dev"] and len(loaded.train) + len(loaded.sets["dev"]) == 9 * len(labels)


def test_numbers_with_fractions_in_a_table_are_no_classes(tmp_path: Path) -> None:
    file = write(tmp_path / "prices.csv", [{"text": f"row {n}", "label": n / 2} for n in range(9)])
    with refused(r"numbers with fractions \(0.5, 1.5, 2.5\): --regression predicts"):
        load_glue_rows(GlueDataConfig(source=file, task="own"))
    assert load_glue_rows(GlueDataConfig(source=file, task="own", regression=True)).task.num_labels == 1


@pytest.mark.parametrize(("factor", "is_said"), [(1, False), (1000, True)])
def test_numbers_that_a_head_hardly_reaches_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, factor: int, is_said: bool
) -> None:
    file = write(tmp_path / "prices.csv", [{"text": f"row {n}", "label": factor * n / 4} for n in range(20)])
    load_glue_rows(GlueDataConfig(source=file, task="own", regression=True))
    assert ("train on (label - " in caplog.text) == is_said


def test_two_columns_of_other_names_in_a_table(tmp_path: Path) -> None:
    rows = [{"frage": f"was {n}", "antwort": f"das {n}", "gut": "ja" if n % 2 else "nein"} for n in range(20)]
    file, dev = write(tmp_path / "paare.csv", rows), write(tmp_path / "prüfung.csv", rows[:3])
    columns = ("text=frage,text2=antwort", "label=gut")
    loaded = load_glue_rows(GlueDataConfig(source=file, task="paare", columns=columns, eval_split=dev))
    assert loaded.train[1].texts == ("was 1", "das 1") and loaded.task.classes == ("ja", "nein")
    assert len(loaded.train) == 20 and len(loaded.sets["dev"]) == 3
    with refused("no column of texts is known: the row has frage, antwort, gut, .*name yours with --columns text="):
        load_glue_rows(GlueDataConfig(source=file, task="paare", columns=("label=gut",)))
    with refused("no column noten, which columns gives to label; it has frage, antwort, gut"):
        load_glue_rows(GlueDataConfig(source=file, task="paare", columns=("label=noten",)))


def test_regression(tmp_path: Path) -> None:
    rows = [{"sentence": f"house {n}", "label": 1000.5 + n} for n in range(12)]
    source = str(tmp_path)
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "test.jsonl", rows[:2])
    loaded = load_glue_rows(GlueDataConfig(source=source, task="prices", regression=True))
    assert loaded.task.num_labels == 1 and loaded.task.metrics == ("pearson", "spearman", "rmse")
    assert loaded.train[3].label == 1003.5 and len(loaded.sets["dev"]) == 2
    with refused("train.jsonl:1: field label is 1000.5; .* numbers with fractions are for --regression"):
        load_glue_rows(GlueDataConfig(source=source, task="prices"))
    write(tmp_path / "train.jsonl", [{"sentence": "a", "label": "cheap"}])
    with refused("train.jsonl:1: field label is 'cheap'; legal: a number"):
        load_glue_rows(GlueDataConfig(source=source, task="prices", regression=True))


def test_what_fixed_tasks_do_not_have_and_one_class_are_refused(tmp_path: Path) -> None:
    for settings in ({"regression": True}, {"columns": ("label=x",)}):
        with pytest.raises(UserError, match="with task rte, which is GLUE's"):
            GlueDataConfig(source="x", task="rte", **settings)
    for source in ("", "hub"):
        with pytest.raises(UserError, match="task=.topics.: must be one of cola, sst2"):
            GlueDataConfig(source=source, task="topics")
    file = write(tmp_path / "a.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": 1}])
    with refused("all training rows have the label '1'; legal: two classes or more"):
        load_glue_rows(GlueDataConfig(source=file, task="own"))
    for label, message in (
        ("a\0b", "field label has a NUL"),
        (None, "field label is None; legal: a text, a whole num"),
    ):
        file = write(tmp_path / "odd.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": label}])
        with refused(f"odd.jsonl:2: {message}"):
            load_glue_rows(GlueDataConfig(source=file, task="own"))


# ----------------------------------------------------------------------------------------------------- multiple choice


def question(number: int, **changes: Any) -> dict[str, Any]:
    return {"question": f"Which is {number}?", "choices": ["one", "two", "three"], "answer": "two"} | changes


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({}, "answer2"),
        ({"answer": "C"}, "answer3"),
        ({"answer": 0}, "answer1"),
        ({"choices": {"text": ["no", "yes"], "label": ["1", "2"]}, "answer": "2"}, "answer2"),
        ({"choices": {"text": ["no", "yes"], "label": [1, 2]}, "answer": 1}, "answer1"),  # a label, and no number
        ({"choices": {"text": ["no", "yes"], "label": [1, 2]}, "answer": "2"}, "answer2"),
        ({"choices": {"text": ["no", "yes"], "label": 7}, "answer": 1}, "answer2"),
        ({"choices": ["same", "same"], "answer": 1}, "answer2"),
        ({"choices": ["A", "C", "B"], "answer": "C"}, "answer2"),  # the text of a choice, before its letter
    ],
)
def test_choices_in_a_column(tmp_path: Path, changes: dict[str, Any], answer: str) -> None:
    file = write(tmp_path / "rules.jsonl", [question(n, **changes) for n in range(30)])
    with refused(f"driving: .* is one file, and one task of its own name: set --tasks {Path(file).stem}$"):
        load_tasks(CommonsenseDataConfig(source=file, tasks=("driving",)))
    train, test = load_tasks(CommonsenseDataConfig(source=file))
    assert set(test) == {"rules"} and len(train) == 28 and len(test["rules"]) == 2
    assert train[0].answer == answer and train[0].output == f"the correct answer is {answer}"
    assert train[0].choices[:2] == ("answer1", "answer2") and "Answer1: " in train[0].instruction


@pytest.mark.parametrize(
    "changes",
    [
        {"answer": 3},
        {"answer": "four"},
        {"answer": None},
        {"answer": True},
        {"choices": ["a", "a", "b"], "answer": "a"},
    ],
)
def test_an_answer_that_is_no_choice_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    file = write(tmp_path / "rules.jsonl", [question(1), question(2, **changes)])
    with refused("rules.jsonl:2: field answer is .*; legal: one of the 3 choices, its letter, or its number from 0 on"):
        load_tasks(CommonsenseDataConfig(source=file))


def test_tasks_of_any_name_and_columns(tmp_path: Path) -> None:
    for task in ("driving", "cooking"):
        for split, count in (("train", 6), ("validation", 2), ("test", 3)):
            rows = [{"q": f"{task} {split} {n}?", "options": ["a", "b"], "right": n % 2} for n in range(count)]
            write(tmp_path / task / f"{split}.jsonl", rows)
    columns = ("question=q,choices=options,answer=right",)
    data = CommonsenseDataConfig(source=str(tmp_path), columns=columns)
    assert resolve_tasks(data) == ("cooking", "driving")
    assert resolve_tasks(data.model_copy(update={"tasks": ("driving",)})) == ("driving",)
    train, test, validation = load_tasks_and_validation(data, validates=True)
    assert [len(part) for part in test.values()] == [3, 3] and [len(part) for part in validation.values()] == [1, 1]
    assert len(train) == 10 and not {row.instruction for part in validation.values() for row in part} & {
        row.instruction for row in train
    }
    named = load_tasks_and_validation(data.model_copy(update={"eval_split": "validation"}), validates=True)
    assert len(named[0]) == 12 and [len(part) for part in named[2].values()] == [2, 2]
    with refused("other: no train file"):
        resolve_tasks(data.model_copy(update={"tasks": ("other",)}))
    (tmp_path / "boolq").mkdir()  # one of the eight is there: the others have to be named
    assert resolve_tasks(data.model_copy(update={"tasks": ("cooking",)})) == ("cooking",)


# ------------------------------------------------------------------------------------------- texts, pairs and passages


def test_summaries_from_a_table_with_other_columns(tmp_path: Path) -> None:
    rows = [{"minutes": f"they met {n}", "outcome": f"{n}"} for n in range(40)]
    file = write(tmp_path / "minutes.csv", rows)
    data = SummarizationDataConfig(source=file, task="minutes", columns=("document=minutes,summary=outcome",))
    splits = load_summaries(data)
    assert {name: len(split) for name, split in splits.items()} == {"train": 38, "validation": 2, "test": 2}
    assert set(splits["train"]["document"][:]).isdisjoint(splits["test"]["document"][:])
    write(tmp_path / "own" / "train.jsonl", [{"document": f"a {n}", "summary": "b"} for n in range(9)])
    write(tmp_path / "own" / "test.jsonl", [{"document": "c", "summary": "d"}])
    for source in (tmp_path, tmp_path / "own"):  # the task's folder, or the folder itself
        found = load_summaries(SummarizationDataConfig(source=str(source), task="own"), None, validates=True)
        assert {name: len(split) for name, split in found.items()} == {"train": 8, "validation": 1, "test": 1}


def test_pairs_of_one_meaning_are_on_one_side(tmp_path: Path) -> None:
    rows = [{"facts": f"item[{n // 3}]", "advert": f"text {n}"} for n in range(60)]
    file = write(tmp_path / "products.jsonl", rows)
    train, test, validation = load_e2e_parts(E2EDataConfig(source=file, columns=("mr=facts", "ref=advert")))
    assert test == validation and len(train) + len(test) == 60 and len(test) % 3 == 0
    assert {mr for mr, _ in train}.isdisjoint(mr for mr, _ in test)


def test_passages_as_squad_publishes_them(tmp_path: Path) -> None:
    asked = {"question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}]}
    passages = [{"context": f"Ann has {n} cats.", "qas": [asked | {"id": f"{n}"}, asked]} for n in range(20)]
    passages[0]["qas"].append({"question": "Where?", "id": "w", "answers": [], "is_impossible": True})
    content = {"version": "own", "data": [{"title": "t", "paragraphs": passages}]}
    (tmp_path / "manual.json").write_text(json.dumps(content))
    data = SquadDataConfig(source=str(tmp_path / "manual.json"), task="v2.0")
    train, test, validation = load_squad_parts(data)
    assert test == validation and len(train) + len(test) == 41 and test
    assert {q.context for q in train}.isdisjoint(q.context for q in test)
    assert all(q.answers == ("Ann",) or q.id == "w" for q in [*train, *test])
    assert len({q.id for q in [*train, *test]}) == 41
    with refused("manual.json:3: the question has no answer, which is for --task v2.0"):
        load_squad_parts(data.model_copy(update={"task": "v1.1"}))
    with refused("eval_split=nowhere.json: no such file"):
        load_squad_parts(data.model_copy(update={"eval_split": "nowhere.json"}))


# ---------------------------------------------------------------------------------------------------- tables of text


def test_splits_may_be_tables_of_text(tmp_path: Path) -> None:
    for name, rows in {
        "topics": [{"text": f"mail {n}", "label": f"{n % 3}"} for n in range(9)],
        "minutes": [{"document": f"they met {n}", "summary": "so"} for n in range(9)],
        "driving": [{"question": f"q {n}", "choices": '["stop", "go"]', "answer": "go"} for n in range(9)],
    }.items():
        for split in ("train", "test"):
            write(tmp_path / name / f"{split}.csv", rows)
    loaded = load_glue_rows(GlueDataConfig(source=str(tmp_path), task="topics"))
    assert loaded.task.classes == ("0", "1", "2") and len(loaded.train) == len(loaded.sets["dev"]) == 9
    splits = load_summaries(SummarizationDataConfig(source=str(tmp_path), task="minutes"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 9, "test": 9}
    train, test = load_tasks(CommonsenseDataConfig(source=str(tmp_path), tasks=("driving",)))
    assert {row.answer for row in train} == {"answer2"} and len(test["driving"]) == 9
    write(tmp_path / "driving" / "train.jsonl", [{"question": "q"}])
    with refused("both train.jsonl and train.csv exist; remove one of them"):
        load_tasks(CommonsenseDataConfig(source=str(tmp_path), tasks=("driving",)))


def test_answers_in_a_table_of_text(tmp_path: Path) -> None:
    answers = json.dumps({"text": ["Ann"], "answer_start": [0]})
    rows = [{"question": "Who?", "context": f"Ann has {n} cats.", "answers": answers} for n in range(20)]
    train, *_ = load_squad_parts(SquadDataConfig(source=write(tmp_path / "manual.csv", rows)))
    numbered = [row | {"id": n, "answers": json.loads(answers)} for n, row in enumerate(rows)]
    kept, held, _ = load_squad_parts(SquadDataConfig(source=write(tmp_path / "manual.jsonl", numbered)))
    assert {question.id for question in [*kept, *held]} == {str(n) for n in range(20)}
    assert len(train) == 19 and {question.answers for question in train} == {("Ann",)}


# ------------------------------------------------------------------------------------------------------------- columns


def test_a_column_that_is_named_is_nothing_else(tmp_path: Path) -> None:
    """One of a pair that is mapped alone makes no pair with the other."""
    rows = [{"premise": f"p {n}", "hypothesis": "h", "label": n % 2} for n in range(40)]
    file = write(tmp_path / "own.jsonl", rows)
    assert load_glue_rows(GlueDataConfig(source=file, task="own")).task.texts == ("premise", "hypothesis")
    alone = load_glue_rows(GlueDataConfig(source=file, task="own", columns=("text=premise",)))
    assert alone.task.texts == ("text",) and alone.train[0].texts == ("p 0",)


def test_a_column_of_another_name_has_its_remedy(tmp_path: Path) -> None:
    def file(**row: Any) -> str:
        return write(tmp_path / "a.jsonl", [row | {"id": n} for n in range(9)])

    said = "--columns {0}=COLUMN if it has another name"
    with refused(f"no column label; the row has text, class, id; {said.format('label')}"):
        load_glue_rows(GlueDataConfig(source=file(**{"text": "a", "class": "b"}), task="own"))
    with refused(f"no column label; the row has text, price, id; {said.format('label')}"):
        load_glue_rows(GlueDataConfig(source=file(text="a", price=1), task="own", regression=True))
    with refused(f"no column mr; the row has facts, ref, id; {said.format('mr')}"):
        load_e2e_parts(E2EDataConfig(source=file(facts="a", ref="b")))
    with refused(f"no column summary; the row has document, outcome, id; {said.format('summary')}"):
        load_summaries(SummarizationDataConfig(source=file(document="a", outcome="b"), bad_rows="error"))
    with refused(f"no usable rows \\(9 left out\\); correct them: .*a.jsonl:1: .*; {said.format('summary')}"):
        load_summaries(SummarizationDataConfig(source=file(document="a", outcome="b"), bad_rows="skip"))
    with refused(f"no column choices; the row has question, options, id; {said.format('choices')}"):
        load_tasks(CommonsenseDataConfig(source=file(question="a", options=["b", "c"])))
    with refused(f"no column answer; the row has question, choices, answerKey, id; {said.format('answer')}"):
        load_tasks(CommonsenseDataConfig(source=file(question="a", choices=["b", "c"], answerKey="A")))
    with refused(f"no column answers; the row has .*reply; {said.format('answers')}"):
        load_squad_parts(SquadDataConfig(source=file(question="a", context="b", reply="c")))


# ------------------------------------------------------------------------------------------------------------ settings


def test_validation_rows_that_nothing_reads_are_refused() -> None:
    with pytest.raises(UserError, match="eval_split validation with eval_every 0: no evaluation reads these"):
        GlueConfig(data={"source": "x", "eval_split": "validation"})
    GlueConfig(data={"source": "x", "eval_split": "validation"}, evaluation={"eval_every": 5})
    GlueConfig(data={"source": "x.csv", "task": "own", "eval_split": "dev.csv"})
    with pytest.raises(UserError, match="with data hub: its columns are known"):
        E2EDataConfig(source="hub", columns=("mr=a",))
    with pytest.raises(UserError, match="keep_best loss with eval_every 0"):
        GlueConfig(evaluation={"keep_best": "loss"})
    with pytest.raises(UserError, match="early_stopping 2 without keep_best"):
        GlueConfig(evaluation={"eval_every": 1, "early_stopping": 2})


def test_a_dry_run_counts_the_rows_that_are_held_out_of_public_sets() -> None:
    data = GlueDataConfig(source="hub", task="rte")
    assert count_rows(data, ["rte"], list) == PUBLIC_ROWS["rte"]
    assert count_rows(data, ["rte"], list, validates=True) == PUBLIC_ROWS["rte"] - 124
    named = data.model_copy(update={"eval_split": "validation"})
    assert count_rows(named, ["rte"], list, validates=True) == PUBLIC_ROWS["rte"]
