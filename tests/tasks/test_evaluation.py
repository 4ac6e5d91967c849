"""Accuracy by likelihood and by generation, on one rank and on several."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adalora_dist.io.errors import UserError
from adalora_dist.tasks.batches import BatchPlan, collate
from adalora_dist.tasks.commonsense.choices import evaluate_choices, reply_log_likelihoods
from adalora_dist.tasks.commonsense.generation import evaluate_generation, parse_answer
from adalora_dist.tasks.commonsense.prompts import encode_examples, prompt_text, prompt_tokens, reply_tokens
from adalora_dist.tasks.commonsense.results import TaskResult, task_result
from adalora_dist.tasks.commonsense.rows import Example, load_task
from adalora_dist.tasks.evaluation.batches import gather_lists
from adalora_dist.tasks.evaluation.texts import left_padded
from tests.support.paths import shared
from tests.support.ranks import run_ranks
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama, word_tokenizer

THINGS = "sugar lemon snow fire stone feather honey vinegar ice lava".split()


def question(text: str, answer: str, choices: tuple[str, ...], number: int) -> Example:
    instruction = f"{text}\n\nAnswer format: {'/'.join(choices)}"
    return Example(instruction, "", f"the correct answer is {answer}", answer, choices, "arc_easy", f"made-up:{number}")


def made_up_questions() -> list[Example]:
    """Questions of various lengths with two or three choices; the answers follow no pattern."""
    questions = []
    for number, thing in enumerate(THINGS):
        choices = ("sweet", "cold", "neither")[: 2 + number % 2]
        text = f"Is this {thing}?" + " Think well before you reply." * (number % 4)
        questions.append(question(text, choices[number * 7 % 5 % len(choices)], choices, number))
    return questions


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
    # and row by row: with the model's own answers declared right, all are right
    agreed = [
        replace(example, answer=answer, output=example.output_for(answer))
        for example, answer in zip(examples, answers, strict=True)
    ]
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


def _scored(rank: int, world_size: int) -> tuple[TaskResult, list[tuple], int]:
    """Result, all ranks' scores, and this rank's number of forwards."""
    model, gathered, num_forwards = tiny_llama(259), [], []
    model.register_forward_pre_hook(lambda *_: num_forwards.append(1))

    def gather(items: list) -> list:
        gathered.extend(gather_lists(items))
        return gathered

    result = evaluate_choices(model, byte_tokenizer(), made_up_questions(), 4, 512, rank, world_size, gather)
    return result, gathered, len(num_forwards)


def test_scores_are_bit_identical_on_any_number_of_ranks_and_all_run_as_many_forwards():
    [(result, scores, num_forwards)] = run_ranks(1, _scored)
    assert len(scores) == 25 and num_forwards == 7
    for world_size, expected in ((3, 3), (4, 2), (8, 1)):
        for other, other_scores, num_forwards in run_ranks(world_size, _scored):
            assert other == result and num_forwards == expected
            assert sorted(other_scores) == sorted(scores)


def test_a_model_returns_to_training_mode_and_keeps_no_graph():
    tokenizer, model, examples = byte_tokenizer(), tiny_llama(259).train(), made_up_questions()
    seen = []
    model.register_forward_hook(lambda module, _, output: seen.append((module.training, output.logits.requires_grad)))
    evaluate_choices(model, tokenizer, examples, 32, 512)
    assert seen == [(False, False)] and model.training


def test_choices_that_look_alike_to_the_tokenizer_are_refused():
    examples = made_up_questions()
    tokenizer = word_tokenizer(["the correct answer is"])  # all choices are unknown words
    with pytest.raises(UserError, match="made-up:.*have the same tokens"):
        evaluate_choices(tiny_llama(len(tokenizer)), tokenizer, examples, 8, 512)


def test_a_real_model_on_real_questions():
    data, folder = shared("data/commonsense"), shared("models/stories260k")
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


def memorising_tokenizer():
    return word_tokenizer([prompt_text(example) + example.output for example in made_up_questions()])


def _teach(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    tokenizer = memorising_tokenizer()
    model = tiny_llama(len(tokenizer)).train()
    rows = encode_examples(made_up_questions(), tokenizer, 128)
    plan = BatchPlan.of_rows(rows, 10, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(200):
        loss = model(**collate([rows[row] for row in plan.batch(step)], 0)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    return model.state_dict()


@pytest.fixture(scope="module")
def taught():
    """A tiny model that has learnt the made-up questions by heart, through this package's own encoding and batches."""
    [state] = run_ranks(1, _teach)  # in a process of its own: a backward pass here would make later forks unsafe
    tokenizer = memorising_tokenizer()
    model = tiny_llama(len(tokenizer))
    model.load_state_dict(state)
    return model, tokenizer, made_up_questions()


def test_both_evaluations_find_what_was_learnt(taught):
    model, tokenizer, examples = taught
    untaught = tiny_llama(len(tokenizer))
    for batch_size in (1, 4):
        by_likelihood = evaluate_choices(model, tokenizer, examples, batch_size, 128)
        by_generation = evaluate_generation(model, tokenizer, examples, batch_size, 128, max_new_tokens=8)
        assert by_likelihood.num_correct == by_generation.num_correct == 10
        assert by_generation.num_parse_failures == 0 and by_generation.method == "generation"
    seen: list[tuple[list[str], list[str]]] = []
    babble = evaluate_generation(
        untaught, tokenizer, examples, 4, 128, 8, show=lambda asked, said: seen.append((asked, said))
    )
    [(asked, said)] = seen
    assert asked == examples and len(said) == 10
    assert (
        sum(parse_answer(text, q.choices) is None for q, text in zip(asked, said, strict=True))
        == babble.num_parse_failures
    )
    assert babble.num_parse_failures > 0 and babble.num_correct + babble.num_parse_failures <= 10
    assert evaluate_generation(model, tokenizer, examples, 4, 128, max_new_tokens=2).num_parse_failures == 10


def _generated(rank: int, world_size: int, model, tokenizer, examples) -> tuple[TaskResult, int]:
    calls = []
    generate = model.generate
    model.generate = lambda **inputs: calls.append(1) or generate(**inputs)
    result = evaluate_generation(model, tokenizer, examples, 3, 128, 8, rank, world_size, synced_gpus=world_size > 1)
    return result, len(calls)


def test_generation_is_the_same_on_three_ranks(taught):
    model, tokenizer, examples = taught
    # The answers of half of the questions are declared wrong, so that a mix-up of rows would change the score.
    examples = examples[:5] + [
        replace(example, answer=wrong, output=example.output_for(wrong))
        for example in examples[5:]
        for wrong in ["cold" if example.answer == "sweet" else "sweet"]
    ]
    for world_size, num_calls in ((1, 4), (3, 2)):
        for result, calls in run_ranks(world_size, _generated, model, tokenizer, examples):
            assert (result.num_rows, result.num_correct, result.num_parse_failures) == (10, 5, 0)
            assert calls == num_calls


# ---- results


def test_a_result_counts_rows_answers_and_failures():
    examples = made_up_questions()
    answers: list[str | None] = [example.answer for example in examples]
    answers[0], answers[1] = None, "hot"
    result = task_result(examples, "generation", answers)
    most = max(sum(e.answer == name for e in examples) for name in ("sweet", "cold", "neither"))
    assert (result.num_rows, result.num_correct, result.num_parse_failures) == (10, 8, 1)
    assert result.accuracy == 0.8 and result.majority == most / 10


def test_gather_joins_the_lists_of_all_ranks():
    assert gather_lists([1, 2]) == [1, 2]  # no process group
    assert run_ranks(2, _gathered) == [[(0, "a"), (1, "a"), (1, "b")]] * 2


def _gathered(rank: int, world_size: int) -> list:
    return gather_lists([(rank, "a"), (rank, "b")][: rank + 1])
