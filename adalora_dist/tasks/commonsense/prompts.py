"""From questions to tokens: one prompt template, one boundary between prompt and reply, everywhere.

The prompt text ends with a line break and the reply starts without a space. The two are tokenised *separately* and
their ids are joined, so the boundary is the same in training, in scoring (any choice) and in generation, whatever the
tokenizer would have merged across it. Special tokens: BOS comes first if and only if the tokenizer itself puts it
there; EOS follows the reply in training where the tokenizer has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from adalora_dist.io.collector import no_collection
from adalora_dist.io.errors import UserError
from adalora_dist.tasks.commonsense.rows import Example
from adalora_dist.tasks.rows.token_cache import Columns, cached_columns
from adalora_dist.tasks.rows.tokens import IGNORED, EncodedRow, eos_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_PROMPT = "Here is a task. Solve it and reply in the format it asks for.\n\n### Instruction:\n{instruction}\n\n"
_PROMPT_INPUT = "### Input:\n{input}\n\n"
_PROMPT_END = "### Response:\n"


def prompt_text(example: Example) -> str:
    """The prompt, a plain template for base models: instruction, input where there is one, response heading."""
    given = _PROMPT_INPUT.format(input=example.input) if example.input else ""
    return _PROMPT.format(instruction=example.instruction) + given + _PROMPT_END


class _Ends(NamedTuple):
    """The special tokens around a sequence; asked for once, since a tokenizer takes longer to answer than to encode."""

    bos: int | None
    eos: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> _Ends:
        return cls(tokenizer.bos_token_id, eos_tokens(tokenizer))


@lru_cache(maxsize=4096)  # replies are few and short: 'the correct answer is answer1', ...
def reply_tokens(tokenizer: PreTrainedTokenizerBase, reply: str) -> tuple[int, ...]:
    """Ids of a reply, without special tokens."""
    return tuple(tokenizer(reply, add_special_tokens=False)["input_ids"])


def choice_tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """Ids of the reply that gives each choice.

    Raises:
        UserError: two of them are the same, or one is empty.
    """
    replies = [reply_tokens(tokenizer, example.output_for(choice)) for choice in example.choices]
    if len(set(replies)) < len(replies) or () in replies:
        raise UserError(
            f"{example.origin}: two of the choices {', '.join(example.choices)} have the same tokens, or one has none, "
            "so no score can tell them apart; use the tokenizer that belongs to the model"
        )
    return replies


def longest_reply(example: Example, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest legal reply, EOS included."""
    return _longest_text(example, tokenizer) + len(eos_tokens(tokenizer))


def _longest_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> int:
    replies = [example.output, *(example.output_for(choice) for choice in example.choices)]
    return max(len(reply_tokens(tokenizer, reply)) for reply in replies)


def check_questions(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[list[int]]:
    """Raise before the training what the evaluation of these examples would raise after it.

    Returns:
        Their prompts.

    Raises:
        UserError: as :func:`prompt_tokens` and :func:`choice_tokens`, naming the row.
    """
    for example in examples:
        choice_tokens(example, tokenizer)
    return prompts_of(examples, tokenizer, max_length)


def prompts_of(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, show_progress: bool = True
) -> list[list[int]]:
    """:func:`prompt_tokens` of every example: many at a time, and from the cache if they are there.

    Raises:
        UserError: as :func:`prompt_tokens`, naming the row.
    """

    def encode(chunk: Sequence[Sequence[Any]]) -> Columns:
        rows = [Example(*fields) for fields in chunk]
        texts = _tokens_of([prompt_text(row) for row in rows], tokenizer)
        return {"prompt": [_cut(*pair, tokenizer, ends, max_length) for pair in zip(rows, texts, strict=True)]}

    if not examples:
        return []
    items = [(e.instruction, e.input, e.output, e.answer, e.choices, e.task, e.origin) for e in examples]
    settings, ends = {"commonsense prompts": 1, "max_length": max_length}, _Ends.of(tokenizer)
    return cached_columns(items, tokenizer, settings, encode, "tokenise", show_progress)["prompt"]


def prompt_tokens(example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """Ids of the prompt, BOS included, leaving room in ``max_length`` for the longest possible reply and EOS.

    A prompt that is too long loses tokens on its left, after BOS. Room is kept for the longest of the choices, not
    for the right one, so that a question has one prompt: in training, for all choices, and in generation.

    Raises:
        UserError: the longest reply leaves no room for a single prompt token.
    """
    [tokens] = _tokens_of([prompt_text(example)], tokenizer)
    return _cut(example, tokens, tokenizer, _Ends.of(tokenizer), max_length)


def _tokens_of(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # Not verbose: it would warn of prompts longer than the model takes, which are about to be cut.
    tokens: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    return tokens


def _cut(
    example: Example, text: Sequence[int], tokenizer: PreTrainedTokenizerBase, ends: _Ends, max_length: int
) -> list[int]:
    """The prompt, from all tokens of its text; raises as :func:`prompt_tokens`."""
    num_reply = _longest_text(example, tokenizer) + len(ends.eos)
    num_prompt = max_length - num_reply
    if num_prompt < 1:
        raise UserError(
            f"{example.origin}: the reply has {num_reply} tokens and max_length={max_length} must be larger; "
            f"set --max-length to {num_reply + 1} or more, or shorten field output"
        )
    tokens = list(text)
    if tokens and tokens[-1:] == ends.eos:  # some tokenizers close every text, and so would end the reply
        tokens.pop()
    if not tokens:
        raise UserError(f"{example.origin}: the prompt has no tokens; use the tokenizer that belongs to the model")
    if len(tokens) <= num_prompt:
        return tokens
    num_bos = int(tokens[0] == ends.bos and num_prompt > 1)
    return tokens[:num_bos] + tokens[len(tokens) - (num_prompt - num_bos) :]


def encode_example(
    example: Example, tokenizer: PreTrainedTokenizerBase, max_length: int, train_on: Literal["output", "all"] = "output"
) -> EncodedRow:
    """Prompt + reply + EOS, at most ``max_length`` tokens, with labels.

    Args:
        train_on: ``output``: reply and EOS are targets; ``all``: prompt tokens too. The first token of a sequence is
            never a target, nothing predicts it; so the number of targets is the number of labels not ``IGNORED``.

    Raises:
        UserError: the reply does not fit, or has no tokens.
    """
    prompt = prompt_tokens(example, tokenizer, max_length)
    return _with_reply(example, prompt, tokenizer, eos_tokens(tokenizer), train_on)


def _with_reply(
    example: Example,
    prompt: list[int],
    tokenizer: PreTrainedTokenizerBase,
    eos: list[int],
    train_on: Literal["output", "all"],
) -> EncodedRow:
    reply = [*reply_tokens(tokenizer, example.output), *eos]
    if not reply:
        raise UserError(
            f"{example.origin}: field output {example.output!r} has no tokens; use the model's own tokenizer"
        )
    masked = len(prompt) if train_on == "output" else 1
    tokens = prompt + reply
    return {"input_ids": tokens, "labels": [IGNORED] * masked + tokens[masked:]}


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    train_on: Literal["output", "all"] = "output",
) -> list[EncodedRow]:
    """``encode_example`` for every row, many at a time; prompts from the cache if they are there.

    Raises:
        UserError: as ``encode_example``, naming the row, or there is no row at all.
    """
    if not examples:
        raise UserError("training data: 0 rows; give at least 1 row")
    prompts, eos = prompts_of(examples, tokenizer, max_length), eos_tokens(tokenizer)
    with no_collection():
        return [_with_reply(*pair, tokenizer, eos, train_on) for pair in zip(examples, prompts, strict=True)]
