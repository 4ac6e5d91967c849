"""Conversations to tokens by a chat template, and which of the tokens are replies.

Loss counts on what the model is to say: assistant turns, with what closes them. Where they stand is proven, not
guessed. A template with generation marks says so itself. Of any other one, three renderings are compared for each
assistant turn: the conversation before it with the generation prompt, the conversation up to and with it, and all of
it. Where each begins the next, the turn is what the second has beyond the first; where not, because the template writes
earlier turns differently once later ones follow, the row is refused. An EOS that the template puts behind whatever is
the last turn, besides what closes every turn, belongs to the last one.

Templates come with models of others. They run in transformers' sandbox, within limits of time and of length.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from adalora_dist.io.cpu_limit import TooLong, cpu_limit
from adalora_dist.io.errors import UserError
from adalora_dist.io.foreign_files import NotReadable, read_plain
from adalora_dist.tasks.rows.fields import REMEDY, shown
from adalora_dist.tasks.rows.tokens import IGNORED, EncodedRow, eos_tokens
from adalora_dist.tasks.sft.messages import THOUGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Content = Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]

CPU_SECONDS = 10.0
"""Of one rendering. Templates take less than a millisecond."""
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
_PROBE_NAME = "a question with its answer"


class RefusedRow(UserError):
    """A row that the template, or this file, cannot make tokens of. The template itself may be right."""


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """For a model that comes without a chat template: a heading per turn, EOS behind each reply."""
    first = tokenizer.bos_token_id
    adds_bos = first is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [first]
    return (
        ("{{ bos_token }}" if adds_bos else "")
        + "{% for message in messages %}### {{ message['role'] | capitalize }}:\n{{ message['content'] | trim }}"
        + ("{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}" if eos_tokens(tokenizer) else "")
        + "{{ '\n\n' }}{% endfor %}{% if add_generation_prompt %}### Assistant:\n{% endif %}"
    )


def set_template(tokenizer: PreTrainedTokenizerBase, file: str) -> str:
    """Give the tokenizer the template of ``file``, or a plain one where it has none; returns what was done, in a line.

    It is saved with the tokenizer, so that whoever loads the trained model talks to it in the same form.

    Raises:
        UserError: the file cannot be read, or no conversation can be rendered with the template.
    """
    if file:
        try:
            tokenizer.chat_template = read_plain(Path(file)).decode("utf-8-sig")
        except (NotReadable, UnicodeDecodeError) as error:
            reason = error if isinstance(error, NotReadable) else "it is not UTF-8 text"
            raise UserError(f"chat_template={file} cannot be read ({reason}); give a file with a template") from error
        said = f"Chat template: {file}"
    elif tokenizer.chat_template:
        said = "Chat template: the tokenizer's own"
    else:
        tokenizer.chat_template = plain_template(tokenizer)
        said = (
            "Chat template: the tokenizer has none, so a plain one is taken and saved with the model (### User:, "
            "### Assistant:); --chat-template FILE for another"
        )
    template = ChatTemplate(tokenizer)
    try:
        template.encode({"messages": _PROBE}, _PROBE_NAME, "assistant", 10**6)
        if not template.writes_texts:
            raise UserError(
                f"{_PROBE_NAME}: the chat template leaves their texts out; take another, with --chat-template FILE"
            )
    except UserError as error:
        raise UserError(f"{said}: {error}") from error
    how = "its generation marks" if template.has_marks else "comparing renderings"
    return f"{said}; replies are found by {how}"


class ChatTemplate:
    """The chat template of a tokenizer, and what it needs to know of it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        text = tokenizer.chat_template or ""
        if isinstance(text, dict):  # several by name
            text = "\n".join(cast(Mapping[str, str], text).values())
        self.has_marks = bool(_MARKS.search(text))
        self.reads_tools = bool(re.search(r"\btools\b", text))
        self.reads_calls = "tool_calls" in text
        self.unread_thoughts = [name for name in THOUGHTS if not re.search(rf"\b{name}\b", text)]
        self._closing = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)

    # ---------------------------------------------------------------------------------------------------- rendering

    def render(self, content: Content, origin: str, num_turns: int | None = None, asks: bool = False) -> str:
        """The text of the first ``num_turns`` turns of a conversation, with the generation prompt behind it if it asks.

        Raises:
            RefusedRow: the template does not take this conversation.
            UserError: it may not do what it does: it takes too long, writes too much, or leaves the sandbox.
        """
        turns = self._turns(content, origin)[:num_turns]
        text = self._apply(turns, content, origin, tokenize=False, add_generation_prompt=asks)
        return cast(str, text)

    def _apply(self, turns: list[Content], content: Content, origin: str, **how: Any) -> Any:
        if self._reads_parts:
            turns = _in_parts(turns)
        return self._rendered(turns, content, origin, **how)

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template wants contents as lists of parts: of texts it would write nothing, or fail."""
        return not self._writes(_PROBE) and self._writes(_in_parts(_PROBE))

    @property
    def writes_texts(self) -> bool:
        """Whether what it makes of a conversation has the texts of it."""
        return self._reads_parts or self._writes(_PROBE)

    def _writes(self, turns: Messages) -> bool:
        try:
            text = self._rendered(list(turns), {}, _PROBE_NAME, tokenize=False)
        except RefusedRow:
            return False
        return all(turn["content"] in text for turn in _PROBE)

    def _rendered(self, turns: list[Content], content: Content, origin: str, **how: Any) -> Any:
        from jinja2.exceptions import SecurityError, TemplateSyntaxError

        tools = content.get("tools") if self.reads_tools else None
        longest = 100_000 + 20 * len(str(content))
        try:
            with cpu_limit(CPU_SECONDS):
                result = self.tokenizer.apply_chat_template(cast(Any, turns), tools=tools, **how)
        except TooLong:
            raise UserError(
                f"{origin}: the chat template has run for {CPU_SECONDS:g} seconds without an end: take another one, "
                "with --chat-template FILE"
            ) from None
        except (SecurityError, TemplateSyntaxError, MemoryError) as error:
            where = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"the chat template cannot be used ({where}{reason}); correct it or take another"
            ) from error
        except Exception as error:  # whatever a template raises, or runs into: a missing key, None + text
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise RefusedRow(f"{origin}: the chat template refuses the conversation ({reason}); {REMEDY}") from error
        length = len(result) if isinstance(result, str) else len(cast(Any, result)["input_ids"])
        if length > longest:
            raise UserError(
                f"{origin}: the chat template has made {length:,} characters of a row of {len(str(content)):,}: take "
                "another one, with --chat-template FILE"
            )
        return result

    def _turns(self, content: Content, origin: str) -> list[Content]:
        """Messages as the template reads them: calls of tools where it has a place for them, else their text."""
        turns: list[Content] = []
        for index, message in enumerate(content["messages"]):
            turn = dict(message)
            text = turn.pop("call_text", None)
            if "tool_calls" in turn and not self.reads_calls:
                del turn["tool_calls"]
                turn["content"] = text or turn["content"]
                if not turn["content"].strip():
                    raise RefusedRow(
                        f"{origin}: turn {index + 1} calls a tool, for which the chat template has no place (it reads "
                        f"no tool_calls); take one that has, with --chat-template FILE; {REMEDY}"
                    )
            turns.append(turn)
        return turns

    # ------------------------------------------------------------------------------------------------------- tokens

    def encode(
        self, content: Content, origin: str, train_on: Literal["assistant", "last", "all"], max_length: int
    ) -> EncodedRow:
        """Tokens and labels of a row's content (see ``forms.Content``), cut to ``max_length`` on the right.

        Labels may all be ``IGNORED``, where the cut has left no reply. The first token never is a target: nothing
        predicts it.

        Raises:
            RefusedRow: the row has no tokens, or which of them are replies is not certain.
            UserError: as :meth:`render`.
        """
        if "messages" in content and train_on == "last":
            content = {**content, "first": last_reply(content)}
        if "messages" not in content:
            tokens, is_reply = self._plain(content)
        elif train_on == "all":
            tokens = self._tokens(self.render(content, origin))
            is_reply = [True] * len(tokens)
        elif self.has_marks:
            tokens, is_reply = self._marked(content, origin)
        else:
            tokens, is_reply = self._compared(content, origin)
        if not any(is_reply[1:]):
            raise RefusedRow(f"{origin}: the row has no tokens to learn: {shown(content)}; {REMEDY}")
        targets = [True] * len(tokens) if train_on == "all" else is_reply
        labels = [token if target else IGNORED for token, target in zip(tokens, targets, strict=True)]
        return {"input_ids": tokens[:max_length], "labels": [IGNORED, *labels[1:max_length]]}

    def prompt(self, content: Content, origin: str) -> tuple[list[int], str] | None:
        """(tokens before the last reply, the reply); None: the row is a plain text.

        Raises:
            RefusedRow: as :meth:`render`.
        """
        if "prompt" in content:
            return self._prompt_tokens(content["prompt"]), content["completion"]
        if "messages" not in content:
            return None
        last = last_reply(content)
        reply = self._turns(content, origin)[last]["content"]
        return self._tokens(self.render(content, origin, last, asks=True)), reply

    def asking(self, messages: Messages, origin: str) -> list[int]:
        """Tokens of a conversation that ends with a turn of the user's, and of what asks for the reply.

        Raises:
            RefusedRow: as :meth:`render`.
        """
        return self._tokens(self.render({"messages": messages}, origin, asks=True))

    def closing(self, row: EncodedRow) -> list[int]:
        """The token that closes the last reply of a row, if it is one that stands for itself (``<|im_end|>``)."""
        targets = [label for label in row["labels"] if label != IGNORED]
        return [token for token in targets[-1:] if token in self._closing]

    def _plain(self, content: Content) -> tuple[list[int], list[bool]]:
        """A prompt and a completion are tokenised by themselves, as they are when the model is asked."""
        eos = eos_tokens(self.tokenizer)
        if "text" in content:
            tokens = [*self._prompt_tokens(content["text"]), *eos]
            return tokens, [True] * len(tokens)
        prompt, reply = self._prompt_tokens(content["prompt"]), [*self._tokens(content["completion"]), *eos]
        return prompt + reply, [False] * len(prompt) + [True] * len(reply)

    def _prompt_tokens(self, text: str) -> list[int]:
        """With BOS where the tokenizer puts it, without EOS, which some put behind every text."""
        tokens = list(self.tokenizer(text, verbose=False)["input_ids"])
        return tokens[:-1] if tokens[-1:] == [self.tokenizer.eos_token_id] else tokens

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _marked(self, content: Content, origin: str) -> tuple[list[int], list[bool]]:
        turns = self._turns(content, origin)
        result = self._apply(
            turns, content, origin, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )  # fmt: skip
        tokens, is_reply = list(result["input_ids"]), [bool(mark) for mark in result["assistant_masks"]]
        if first := content.get("first", 0):
            num_given = len(self._tokens(self.render(content, origin, first, asks=True)))
            is_reply = [mark and index >= num_given for index, mark in enumerate(is_reply)]
        return tokens, is_reply

    def _compared(self, content: Content, origin: str) -> tuple[list[int], list[bool]]:
        whole, messages = self.render(content, origin), content["messages"]
        spans = []
        for k, message in enumerate(messages):
            if message["role"] != "assistant" or k < content.get("first", 0):
                continue
            before = self.render(content, origin, k, asks=True) if k else None
            after = whole if k + 1 == len(messages) else self._without_end(self.render(content, origin, k + 1), whole)
            if before is None or not (after.startswith(before) and whole.startswith(after)):
                why = (
                    "begins the conversation, so nothing asks for it" if before is None
                    else "is written differently when later turns follow, or than the generation prompt announces it"
                )  # fmt: skip
                raise RefusedRow(
                    f"{origin}: turn {k + 1}, of the assistant, {why}: which tokens are its own is not certain; take a "
                    f"template with generation marks (--chat-template FILE), --train-on last (the last reply of each "
                    f"row alone), or --train-on all; {REMEDY}"
                )
            spans.append((len(before), len(after)))
        return self._tokens_in(whole, spans, origin)

    def _without_end(self, after: str, whole: str) -> str:
        """``after`` without the EOS that the template puts behind all turns, as it does in ``whole``."""
        eos = self.tokenizer.eos_token
        if not eos or whole.startswith(after) or not whole.rstrip().endswith(str(eos)):
            return after
        return after.rstrip().removesuffix(str(eos))

    def _tokens_in(self, text: str, spans: list[tuple[int, int]], origin: str) -> tuple[list[int], list[bool]]:
        """Tokens of ``text``, and which of them have characters of ``spans``.

        What follows the token that closes a turn, a line break in most templates, is the template's.
        """
        if self.tokenizer.is_fast:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            tokens, offsets = list(found["input_ids"]), found["offset_mapping"]
        else:
            tokens, offsets = self._tokens(text), []
            cuts = {cut: self._tokens(text[:cut]) for span in spans for cut in span}
            for prefix in cuts.values():
                if tokens[: len(prefix)] != prefix:
                    raise RefusedRow(f"{origin}: the tokenizer joins a reply with what stands around it; {REMEDY}")
            spans = [(len(cuts[start]), len(cuts[end])) for start, end in spans]
            offsets = [(index, index + 1) for index in range(len(tokens))]
        is_reply = [False] * len(tokens)
        index = 0
        for start, end in spans:
            own = []
            while index < len(tokens) and offsets[index][0] < end:
                # A token of blanks alone can have no width: offsets leave out blanks that begin a word.
                if offsets[index][1] > start or start <= offsets[index][0] == offsets[index][1]:
                    own.append(index)
                index += 1
            closed = [k for k in own if tokens[k] in self._closing]
            if closed and not str(self.tokenizer.decode([tokens[k] for k in own if k > closed[-1]])).strip():
                own = [k for k in own if k <= closed[-1]]
            for k in own:
                is_reply[k] = True
        return tokens, is_reply


def last_reply(content: Content) -> int:
    """The number of a conversation's last assistant turn."""
    return max(k for k, turn in enumerate(content["messages"]) if turn["role"] == "assistant")


def _in_parts(turns: Messages) -> list[Content]:
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
