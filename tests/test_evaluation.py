"""Accuracy by likelihood and by generation, on one rank and on several."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny_language_model import byte_tokenizer, tiny_llama, word_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from adalora_dist.data.batches import BatchPlan, collate
from adalora_dist.data.commonsense import Example, load_task
from adalora_dist.data.encoding import encode_examples, prompt_text, prompt_tokens, reply_tokens
from adalora_dist.errors import UserError
from adalora_dist.evaluation.choices import evaluate_choices, reply_log_likelihoods
from adalora_dist.evaluation.generation import evaluate_generation, left_padded, parse_answer
from adalora_dist.evaluation.results import TaskResult, gather_lists, task_result

SHARED = Path(__file__).parents[2] / "shared"
THINGS = "sugar lemon snow fire stone feather honey vinegar ice lava".split()


def question(text: str, answer: str, choices: tuple[str, ...], number: int) -> Example:
    instruction = f"{text}\n\nAnswer format: {'/'.join(choices)}"
    return Example(instruction, "", f"the correct answer is {answer}", answer, choices, "arc_easy", f"made-up:{number}")


def made_up_questions() -> list[Example]:
    """Questions of various lengths with two or three choices; the answers follow no pattern."""
    questions = []
    for number, thing in enumerate(THINGS):
        choices = ("answer1", "answer2", "answer3")[: 2 + number % 2]
        text = f"Is this {thing}?" + " Think well before you reply." * (number % 4)
        questions.append(question(text, choices[number * 7 % 5 % len(choices)], choices, number))
    return questions


def on_ranks(world_size: int, evaluate: Callable[..., TaskResult]) -> list[TaskResult]:
    """Call ``evaluate(rank=, world_size=, gather=)`` on as many threads, with a gather that joins their lists."""
    barrier = threading.Barrier(world_size, timeout=60)
    parts: list[list] = [[] for _ in range(world_size)]

    def gather_of(rank: int) -> Callable[[list], list]:
        def gather(items: list) -> list:
            parts[rank] = items
            barrier.wait()
            return [item for part in parts for item in part]

        return gather

    with ThreadPoolExecutor(world_size) as threads:
        calls = [
            threads.submit(evaluate, rank=rank, world_size=world_size, gather=gather_of(rank))
            for rank in range(world_size)
        ]
        return [call.result(timeout=60) for call in calls]


# ---- likelihood


@torch.no_grad()
def naive_answer(model, tokenizer, example: Example) -> str:
    totals = []
    for choice in example.choices:
        prompt = prompt_tokens(example, tokenizer, 512)
        tokens = torch.tensor([prompt + list(reply_tokens(tokenizer, example.output_for(choice)))])
        log_p = model(tokens).logits[0].log_softmax(-1)
        totals.append(sum(log_p[t - 1, tokens[0, t]].item() for t in range(len(prompt), tokens.shape[1])))
    return example.choices[max(range(len(totals)), key=totals.__getitem__)]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_choices_agree_with_scoring_one_by_one(batch_size):
    tokenizer, model, examples = byte_tokenizer(), tiny_llama(259), made_up_questions()
    answers = [naive_answer(model, tokenizer, example) for example in examples]
    assert len(set(answers)) > 1  # or the comparison would say little
    expected = sum(answer == example.answer for answer, example in zip(answers, examples, strict=True))
    result = evaluate_choices(model, tokenizer, examples, batch_size, 512)
    assert result == TaskResult("arc_easy", "likelihood", 10, expected, majority=result.majority)
    # each question is worth what it says: if its answer is what the model gives, all are correct
    agreed = [question(prompt, a, e.choices, n) for n, (e, a) in enumerate(zip(examples, answers, strict=True))
              for prompt in [e.instruction.partition("\n\n")[0]]]  # fmt: skip
    assert evaluate_choices(model, tokenizer, agreed, batch_size, 512).accuracy == 1.0


@pytest.mark.parametrize("logits_to_keep", [True, False])
def test_log_likelihoods_of_replies(logits_to_keep):
    tokenizer, model = byte_tokenizer(), tiny_llama(259)
    prompts = [tokenizer(text)["input_ids"] for text in ("a long prompt", "p", "some")]
    replies = [list(reply_tokens(tokenizer, text)) for text in ("yes", "nonsense", "x")]
    scored = model
    if not logits_to_keep:
        scored = torch.nn.Module()  # a wrapper whose forward does not tell what it takes
        scored.forward = lambda **inputs: model(**inputs)
    with torch.no_grad():
        sums = reply_log_likelihoods(scored, prompts, replies, 0, torch.device("cpu"))
        for total, prompt, reply in zip(sums, prompts, replies, strict=True):
            log_p = model(torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
            expected = sum(log_p[len(prompt) - 1 + i, token] for i, token in enumerate(reply))
            torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_every_rank_runs_as_many_forwards_and_scores_are_bit_identical():
    tokenizer, examples = byte_tokenizer(), made_up_questions()
    scores: dict[int, dict] = {}
    num_forwards: dict[int, list[int]] = {}
    for world_size in (1, 3, 4):
        models = [tiny_llama(259) for _ in range(world_size)]
        counts = [0] * world_size
        for rank, model in enumerate(models):
            model.register_forward_pre_hook(
                lambda *_, rank=rank, counts=counts: counts.__setitem__(rank, counts[rank] + 1)
            )
        gathered: list[list] = []

        def evaluate(rank, world_size, gather, models=models, gathered=gathered):
            def recording_gather(items):
                joined = gather(items)
                gathered.append(joined)
                return joined

            return evaluate_choices(models[rank], tokenizer, examples, 4, 512, rank, world_size, recording_gather)

        results = on_ranks(world_size, evaluate)
        assert set(results) == {evaluate_choices(tiny_llama(259), tokenizer, examples, 4, 512)}
        scores[world_size] = {(index, choice): total for index, choice, total in gathered[0]}
        assert len(gathered[0]) == len(scores[world_size]) == sum(len(e.choices) for e in examples)  # none twice
        num_forwards[world_size] = counts
    assert scores[1] == scores[3] == scores[4]
    assert num_forwards == {1: [7], 3: [3] * 3, 4: [2] * 4}  # 25 sequences in batches of 4


def test_a_model_returns_to_training_mode_and_keeps_no_graph():
    tokenizer, model, examples = byte_tokenizer(), tiny_llama(259).train(), made_up_questions()
    seen = []
    model.register_forward_hook(lambda module, _, output: seen.append((module.training, output.logits.requires_grad)))
    evaluate_choices(model, tokenizer, examples, 32, 512)
    assert seen == [(False, False)] and model.training


def test_choices_that_look_alike_to_the_tokenizer_are_refused():
    examples = made_up_questions()
    tokenizer = word_tokenizer(["the correct answer is"])  # answer1, answer2 are both unknown
    with pytest.raises(UserError, match="made-up:.*have the same tokens"):
        evaluate_choices(tiny_llama(len(tokenizer)), tokenizer, examples, 8, 512)


def test_a_real_model_on_real_questions():
    data, folder = SHARED / "data/commonsense", SHARED / "models/stories260k"
    for path in (data, folder):
        if not path.is_dir():
            pytest.skip(f"no real data or model at {path}")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    examples = load_task(str(data), "boolq", "test")[:24]
    result = evaluate_choices(model, tokenizer, examples, 16, 256)
    expected = [naive_answer(model, tokenizer, example) for example in examples]
    assert result.num_correct == sum(a == e.answer for a, e in zip(expected, examples, strict=True))


# ---- generation


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("the correct answer is answer2", "answer2"),
        ("answer3", "answer3"),
        (" answer1.\n", "answer1"),
        ("The correct answer is: answer2, not answer1", "answer2"),
        ("answer1? no, the correct answer is answer3", "answer3"),
        ("answer1 answer2", "answer1"),
        ("", None),
        ("answer4", None),
        ("answer12", None),
        ("myanswer1", None),
        ("Answer1: sugar Answer2: salt", None),
        ("answer1? the correct answer is unknown", None),
        ("I think it is the second", None),
    ],
)
def test_parse_answer(text, answer):
    assert parse_answer(text, ("answer1", "answer2", "answer3")) == answer


def test_parse_answer_prefers_the_longer_of_two_names():
    assert parse_answer("is not so", ("is", "is not")) == "is not"


def test_left_padding():
    input_ids, attention_mask = left_padded([[5, 6, 7], [8]], padding=9)
    assert input_ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.fixture(scope="module")
def taught():
    """A tiny model that has learnt the made-up questions by heart, through this package's own encoding and batches."""
    examples = made_up_questions()
    tokenizer = word_tokenizer([prompt_text(example) + example.output for example in examples])
    model = tiny_llama(len(tokenizer)).train()
    rows = encode_examples(examples, tokenizer, 128)
    plan = BatchPlan.of_rows(rows, 10, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(200):
        loss = model(**collate([rows[row] for row in plan.batch(step)], 0)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    return model.eval(), tokenizer, examples


def test_both_evaluations_find_what_was_learnt(taught):
    model, tokenizer, examples = taught
    untaught = tiny_llama(len(tokenizer))
    for batch_size in (1, 4):
        by_likelihood = evaluate_choices(model, tokenizer, examples, batch_size, 128)
        by_generation = evaluate_generation(model, tokenizer, examples, batch_size, 128, max_new_tokens=8)
        assert by_likelihood.num_correct == by_generation.num_correct == 10
        assert by_generation.num_parse_failures == 0 and by_generation.method == "generation"
    babble = evaluate_generation(untaught, tokenizer, examples, 4, 128, max_new_tokens=8)
    assert babble.num_parse_failures > 0 and babble.num_correct + babble.num_parse_failures <= 10
    assert evaluate_generation(model, tokenizer, examples, 4, 128, max_new_tokens=2).num_parse_failures == 10


def test_generation_is_the_same_on_three_ranks(taught):
    model, tokenizer, examples = taught
    # Half of the answers are declared wrong, so that a mix-up of rows would change the score.
    examples = examples[:5] + [
        question(e.instruction.partition("\n\n")[0], "answer2" if e.answer == "answer1" else "answer1", e.choices, n)
        for n, e in enumerate(examples[5:])
    ]
    calls = []

    def evaluate(rank, world_size, gather):
        own = tiny_llama(len(tokenizer))
        own.load_state_dict(model.state_dict())
        generate = own.generate
        own.generate = lambda **inputs: calls.append(rank) or generate(**inputs)
        return evaluate_generation(own, tokenizer, examples, 3, 128, 8, rank, world_size, gather)

    results = on_ranks(3, evaluate)
    assert {(r.num_rows, r.num_correct, r.num_parse_failures) for r in results} == {(10, 5, 0)}
    assert sorted(calls) == [0, 0, 1, 1, 2, 2]  # 4 batches on 3 ranks: 2 calls each


# ---- results


def test_a_result_counts_rows_answers_and_failures():
    examples = made_up_questions()
    answers: list[str | None] = [example.answer for example in examples]
    answers[0], answers[1] = None, "answer9"
    result = task_result(examples, "generation", answers)
    most = max(sum(e.answer == name for e in examples) for name in ("answer1", "answer2", "answer3"))
    assert (result.num_rows, result.num_correct, result.num_parse_failures) == (10, 8, 1)
    assert result.accuracy == 0.8 and result.majority == most / 10


def test_gather_joins_the_lists_of_real_processes(tmp_path):
    """Two forked processes over gloo; without a process group the list comes back as it is."""
    assert gather_lists([1, 2]) == [1, 2]
    from distributed import run_ranks

    assert run_ranks(_gathered, 2) == [[(0, "a"), (1, "a"), (1, "b")]] * 2


def _gathered(rank: int, world_size: int) -> list:
    return gather_lists([(rank, "a"), (rank, "b")][: rank + 1])
