"""The SQuAD recipe: windows, answers, scores, the recipe's real commands, and what it exports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForQuestionAnswering

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.losses import span_loss
from adalora_dist.tasks.squad.answers import find_answers
from adalora_dist.tasks.squad.config import SquadDataConfig
from adalora_dist.tasks.squad.demo import demo_passages, demo_passages_folder
from adalora_dist.tasks.squad.metrics import best_thresholds, exact_match, f1, normalise, squad_scores
from adalora_dist.tasks.squad.rows import NO_SPAN, Question, Window, load_squad, make_windows, question_of
from tests.support.paths import shared
from tests.support.ranks import import_deepspeed, import_package
from tests.support.recipe_runs import ENGINES, Run, run_recipe
from tests.support.refusals import refusal
from tests.support.scored_answers import STORED
from tests.support.settings import adapter_flags
from tests.support.tiny_encoders import encoder_tokenizer, write_encoder, write_squad

import_deepspeed()
import_package()

TASKS = {"1": "v1.1", "2": "v2.0"}
STEPS = 16
FLAGS = [
    *("--max-steps", str(STEPS), "--batch-size", "16", "--micro-batch-size", "8", "--learning-rate", "1e-2"),
    *("--log-every", "8", "--eval-batch-size", "4"),
    *("--max-length", "18", "--doc-stride", "4", "--max-question-length", "8"),
]
ADAPTER = {"init_rank": 3, "target_rank": 2, "start": "paper", "init": "orthonormal"}


def run_of(output: Path, words: list[str], engine: str | None = None) -> Run:
    """The recipe on one process, or on two of ``engine``."""
    code, _, errors = run_recipe("deberta_squad", 2 if engine else 1, words, ENGINES[engine] if engine else {})
    assert code == 0, errors
    return Run(output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("squad")
    write_squad(path)
    for kind in ("bert", "deberta"):
        write_encoder(path / kind, kind)
    settings = path / "bert" / "config.json"  # as of a model that was trained to tell three classes
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"id2label": dict.fromkeys(range(3), "x")}))
    return path


@pytest.fixture(autouse=True, scope="module")
def _cache(folder: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADALORA_DIST_CACHE", str(folder / "cache"))
        yield


def arguments(folder: Path, output_dir: Path, *more: str, model: str = "bert", version: str = "1") -> list[str]:
    where = ["--model", str(folder / model), "--data", str(folder / f"v{version}"), "--task", TASKS[version]]
    return [*where, *FLAGS, *adapter_flags(more, **ADAPTER), "--output-dir", str(output_dir), *more]


# ------------------------------------------------------------------------------------------------------------- rows


def row(**changes: Any) -> dict[str, Any]:
    answers = {"text": ["Rome"], "answer_start": [13]}
    return {"id": "1", "question": "where?", "context": "Bob lives in Rome .", "answers": answers} | changes


BAD_ROWS = [
    ([1], "the row is a list"),
    (row(context=" "), "field context is ' '"),
    (row(id=7.5), "field id is 7.5"),
    (row(answers=["Rome"]), "field answers must be an object"),
    (row(answers={"text": ["Rome"], "answer_start": [12]}), "answer 'Rome' does not start at character 12"),
    (row(answers={"text": [], "answer_start": []}), "no answer, which is for --task v2.0"),
]


@pytest.mark.parametrize(("content", "says"), BAD_ROWS, ids=[says for _, says in BAD_ROWS])
def test_bad_rows_are_named(content: Any, says: str) -> None:
    message = refusal(question_of, "v1.1", content, "file:3")
    assert message.startswith("file:3: ") and says in message


def test_good_rows() -> None:
    assert question_of("v1.1", row(), "") == Question("1", "where?", "Bob lives in Rome .", ("Rome",), (13,))
    assert question_of("v2.0", row(answers={"text": [], "answer_start": []}), "").answers == ()


def test_real_data_can_be_read() -> None:
    train, validation = load_squad(SquadDataConfig(source=str(shared("data/squad_v1"))))
    assert (len(train), len(validation)) == (2000, 500)


@pytest.mark.parametrize("task", ["v1.1", "v2.0"])
def test_built_in_passages_hold_their_answers_once_and_share_none(task: str) -> None:
    train, validation = load_squad(SquadDataConfig(source=str(demo_passages_folder(task)), task=task))
    assert (len(train), len(validation)) == (1500, 300)
    answers = [{text for question in part for text in question.answers} for part in (train, validation)]
    assert answers[0] and answers[1] and not answers[0] & answers[1]
    for question in train + validation:
        assert all(question.context.count(text) == 1 for text in question.answers)
    without = sum(not question.answers for question in validation)
    assert without == (100 if task == "v2.0" else 0)
    assert demo_passages("train", False) == demo_passages("train", False) != demo_passages("train", False, seed=1)


# ---------------------------------------------------------------------------------------------------------- windows


def windows_of(questions: list[Question], **changes: int) -> list[Window]:
    size = {"max_length": 32, "doc_stride": 4, "max_question_length": 8} | changes
    return make_windows(questions, encoder_tokenizer(), SquadDataConfig(**size), "windows", False)


def test_windows_overlap_cover_the_passage_and_know_the_answer() -> None:
    context = " ".join(
        f"Ann lives in {place} ." for place in ("Oslo", "Lima", "Rome", "Bern", "Cairo", "Delhi", "Oslo")
    )
    question = Question("1", "where does Ann live ?", context, ("Bern",), (context.index("Bern"),))
    windows = windows_of([question])
    assert len(windows) > 1
    covered: set[int] = set()
    found = 0
    for window in windows:
        tokens = window.inputs["input_ids"]
        assert len(tokens) == len(window.starts) == len(window.ends) <= 32 and window.question == 0
        inside = [k for k, start in enumerate(window.starts) if start >= 0]
        assert {window.inputs["token_type_ids"][k] for k in inside} == {1}
        own = {window.starts[k] for k in inside}
        assert not covered or len(covered & own) == 4  # doc_stride
        covered |= own
        if window.span != NO_SPAN:
            first, last = window.span
            assert context[window.starts[first] : window.ends[last]] == "Bern"
            found += 1
        else:
            assert context.index("Bern") not in own
    assert found and covered == {k for k, c in enumerate(context) if c != " " and (k == 0 or context[k - 1] == " ")}


def test_an_answer_of_several_tokens_must_lie_in_the_window_whole() -> None:
    context = "Ann lives in Oslo . " * 6
    start = context.index("Oslo", 60)
    answer = context[start : start + 16]  # over several tokens
    for window in windows_of([Question("1", "where ?", context, (answer,), (start,))], max_length=24):
        inside = [k for k, value in enumerate(window.starts) if value >= 0]
        whole = window.starts[inside[0]] <= start and window.ends[inside[-1]] >= start + len(answer)
        assert (window.span != NO_SPAN) == whole
        if whole:
            assert context[window.starts[window.span[0]] : window.ends[window.span[1]]].startswith("Oslo")


def test_long_questions_are_cut_and_windows_that_cannot_advance_refused() -> None:
    question = Question("1", "where does " * 30 + "Ann live ?", "Ann lives in Rome .", (), ())
    [window] = windows_of([question])
    assert len([k for k in window.starts if k < 0]) == 8 + 3  # the question's tokens, [CLS] and two [SEP]
    with pytest.raises(UserError, match="windows might not advance, max_length must be at least 37"):
        SquadDataConfig(max_length=36, doc_stride=24, max_question_length=8)


# ---------------------------------------------------------------------------------------------------------- answers


def a_window(question: int, starts: list[int], ends: list[int]) -> Window:
    return Window(question, {"input_ids": [0] * len(starts)}, starts, ends, NO_SPAN)


def test_best_answer_over_windows_by_hand() -> None:
    context = "red green blue"
    # [CLS] question [SEP] and three words; the second window has the last two only.
    windows = [
        a_window(0, [-1, -1, -1, 0, 4, 10], [-1, -1, -1, 3, 9, 14]),
        a_window(0, [-1, -1, -1, 4, 10], [-1, -1, -1, 9, 14]),
    ]
    question = Question("1", "?", context, ("green",), (4,))
    logits = [
        (torch.tensor([1.0, 9, 9, 3, 2, 0]), torch.tensor([1.5, 9, 9, 0, 1, 4])),  # best: red .. blue, 7
        (torch.tensor([0.0, 9, 9, 5, 0]), torch.tensor([0.5, 9, 9, 1, 3])),  # best: green .. blue, 8
    ]
    [answer] = find_answers([question], windows, logits, num_best=20, max_answer_length=3)
    assert answer.text == "green blue" and answer.null_score == 0.5 - 8
    assert [(b["text"], b["score"]) for b in answer.best] == [
        ("green blue", 8.0), ("red green blue", 7.0), ("green", 6.0), ("red green", 4.0), ("blue", 4.0), ("red", 3.0)
    ]  # fmt: skip
    assert sum(b["probability"] for b in answer.best) == pytest.approx(1)
    assert answer.best[0]["probability"] / answer.best[1]["probability"] == pytest.approx(math.e)
    [short] = find_answers([question], windows, logits, num_best=20, max_answer_length=1)
    assert (short.text, short.best[0]["score"]) == ("green", 6.0)
    [greedy] = find_answers([question], windows, logits, num_best=1, max_answer_length=3)
    assert [b["text"] for b in greedy.best] == ["green blue"]
    assert answer.given(None) == answer.given(-7.5) == "green blue" and answer.given(-7.6) == ""


# --------------------------------------------------------------------------------------------------------- the scores

# Normalised forms worked out by hand from the definition: lower case, punctuation out, articles out, single spaces.
NORMALISED = [
    ("The Cat!", "cat"),
    ("a  an the", ""),
    ("An apple-a-day", "appleaday"),
    ("Theatre, another ban", "theatre another ban"),
    ("U.S.A.", "usa"),
    ("1,000 km²", "1000 km²"),
    ("It’s “here”", "it’s “here”"),  # curly quotation marks are no ASCII punctuation
    ("\tthe\nend ", "end"),
    ("the-end", "theend"),
]


@pytest.mark.parametrize(("text", "expected"), NORMALISED)
def test_normalisation(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_scores_of_a_stored_set() -> None:
    v1, v2 = ([case for case in STORED if case[column] is not None] for column in (2, 3))
    for task, cases, column in (("v1.1", v1, 2), ("v2.0", v2, 3)):
        for case in cases:
            found = squad_scores(task, [case[0]], [case[1]])
            assert (found["exact"], found["f1"]) == pytest.approx((100 * case[column][0], 100 * case[column][1])), case
    total = squad_scores("v1.1", [c[0] for c in v1], [c[1] for c in v1])
    assert total == pytest.approx({"exact": 100 * 2 / 7, "f1": 100 * (1 + 3 * 0.8) / 7})
    total = squad_scores("v2.0", [c[0] for c in v2], [c[1] for c in v2])
    assert total == pytest.approx(
        {
            "exact": 100 * 2 / 8, "f1": 100 * (2 + 3 * 0.8) / 8,
            "answerable exact": 100 / 6, "answerable f1": 100 * (1 + 3 * 0.8) / 6,
            "unanswerable exact": 50, "unanswerable f1": 50,
        }
    )  # fmt: skip


def test_answers_that_normalise_to_nothing() -> None:
    assert exact_match("The", "a") == 1
    assert f1("The", "a", both_empty=0) == 0 and f1("The", "a", both_empty=1) == 1
    assert squad_scores("v1.1", ["The"], [["a"]]) == {"exact": 100, "f1": 0}
    # v2.0 drops the right answer 'a', so that the question has none, and 'The' counts as nothing answered.
    assert squad_scores("v2.0", ["The"], [["a"]])["exact"] == 100


a_case = st.tuples(st.sampled_from(["x", "y z", "y"]), st.sampled_from([(), ("x",), ("y",)]), st.integers(-3, 3))


@given(st.lists(a_case, min_size=1, max_size=9))
@settings(max_examples=100, deadline=None)
def test_best_threshold_is_the_best_of_all(cases: list[tuple[str, tuple[str, ...], int]]) -> None:
    answers, right, null_scores = (list(part) for part in zip(*cases, strict=True))
    found = best_thresholds(answers, [float(n) for n in null_scores], right)

    def at(threshold: float, name: str) -> float:
        given = ["" if null > threshold else a for a, null in zip(answers, null_scores, strict=True)]
        return squad_scores("v2.0", given, right)[name]

    for name in ("exact", "f1"):
        every = [at(threshold, name) for threshold in range(-5, 5)]
        assert found[f"best {name}"] == pytest.approx(max(every))
        assert at(found[f"best {name} threshold"], name) == pytest.approx(max(every))


# ------------------------------------------------------------------------------------------------------------- loss


def test_loss_is_transformers_own_summed_over_windows(folder: Path) -> None:
    model = AutoModelForQuestionAnswering.from_pretrained(folder / "bert", num_labels=2).eval()
    inputs = [{"input_ids": ids, "token_type_ids": [0] * len(ids)} for ids in ([1, 4, 5, 2], [1, 6, 2])]
    spans = [(1, 2), (0, 0)]
    loss_sum = span_loss(inputs, spans, 0, torch.device("cpu"))
    with torch.no_grad():
        total = sum(
            model(
                input_ids=torch.tensor([r["input_ids"]]),
                start_positions=torch.tensor([a]),
                end_positions=torch.tensor([b]),
            ).loss.item()
            for r, (a, b) in zip(inputs, spans, strict=True)
        )
        # In a batch, padding takes no part in the softmax over positions, so that batches can be cut anyhow.
        assert loss_sum(model, [0, 1]).item() == pytest.approx(total, rel=1e-5)
        assert loss_sum(model, []).item() == 0


# ------------------------------------------------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, Run]:
    """By version, the one-process run that others are compared with."""
    runs = {}
    for version, kind in (("1", "bert"), ("2", "deberta")):
        output = folder / f"single_{version}"
        runs[version] = run_of(output, arguments(folder, output, model=kind, version=version))
    return runs


@pytest.mark.parametrize("version", ["1", "2"])
def test_one_process_learns_scores_and_exports(single: dict[str, Run], folder: Path, version: str) -> None:
    run = single[version]
    assert sum(run.pattern.values()) == 2 * len(run.pattern) > 0
    assert run.losses[-4:].mean() < run.losses[:4].mean()
    assert run.results["merged"] == pytest.approx(run.results["after"], abs=1e-4)
    names = {"exact", "f1"}
    if version == "2":
        names |= {f"{kind} {name}" for kind in ("answerable", "unanswerable") for name in ("exact", "f1")}
        names |= {f"best {name}{what}" for name in ("exact", "f1") for what in ("", " threshold")}
        assert run.results["after"]["best f1"] >= run.results["after"]["f1"]
    assert set(run.results["after"]) == names
    # The scores in the table are those of the answers that were written.
    data = SquadDataConfig(source=str(folder / f"v{version}"), task="v2.0")
    _, questions = load_squad(data)
    predictions = json.loads((run.folder / "predictions.json").read_text())
    assert list(predictions) == [question.id for question in questions]
    again = squad_scores(TASKS[version], list(predictions.values()), [question.answers for question in questions])
    assert again.items() <= run.results["after"].items()
    best = json.loads((run.folder / "nbest_predictions.json").read_text())
    for question in questions:
        assert all(entry["text"] in question.context for entry in best[question.id])


@pytest.mark.parametrize(
    ("engine", "version"),
    [
        ("zero3", "1"),
        *(pytest.param(*launch, marks=pytest.mark.slow) for launch in (("ddp", "1"), ("fsdp2", "2"), ("zero2", "2"))),
    ],
)
def test_two_processes_do_what_one_does(folder: Path, single: dict[str, Run], engine: str, version: str) -> None:
    output, kind = folder / f"{engine}_{version}", {"1": "bert", "2": "deberta"}[version]
    run = run_of(output, arguments(folder, output, model=kind, version=version), engine)
    expected = single[version]
    assert (run.facts["engine"], run.facts["num_processes"]) == (engine, 2)
    assert run.pattern == expected.pattern
    torch.testing.assert_close(run.losses, expected.losses, rtol=0, atol=1e-4)
    ours, theirs = (json.loads((r.folder / "predictions.json").read_text()) for r in (run, expected))
    assert ours == theirs
    ours, theirs = ({k: v for k, v in r.results["after"].items() if "threshold" not in k} for r in (run, expected))
    assert ours == pytest.approx(theirs)


def test_seeds(folder: Path, tmp_path: Path) -> None:
    quick = "--max-steps 3 --export-formats none --no-evaluate-before --method lora --seeds 4 5".split()
    code, _, errors = run_recipe("deberta_squad", 1, arguments(folder, tmp_path / "many", *quick))
    assert code == 0, errors
    results = json.loads((tmp_path / "many" / "results.json").read_text())
    assert set(results["summary"]) == {"exact", "f1"} and len(results["runs"]) == 2
