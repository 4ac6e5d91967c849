"""Chat templates in the styles of five families, written for these tests, and what each makes of a conversation.

``expected`` has the texts by hand, with [[brackets]] around what is learnt: no template engine is asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Turns = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Style:
    """``template`` in Jinja, the special tokens that it writes, and its outcome of (role, text) turns, with marks."""

    template: str
    specials: tuple[str, ...]
    expected: Callable[[Turns], str]
    takes_system: bool = True

    @property
    def marked(self) -> str:
        """The same template with generation marks around replies and what closes them."""
        return self.template.replace("<GEN>", "{% generation %}").replace("</GEN>", "{% endgeneration %}")

    @property
    def plain(self) -> str:
        return self.template.replace("<GEN>", "").replace("</GEN>", "")


def _chatml(turns: Turns) -> str:
    def body(role: str, text: str) -> str:
        return f"[[{text}<|im_end|>]]" if role == "assistant" else f"{text}<|im_end|>"

    return "".join(f"<|im_start|>{role}\n{body(role, text)}\n" for role, text in turns)


def _llama3(turns: Turns) -> str:
    def body(role: str, text: str) -> str:
        return f"[[{text}<|eot_id|>]]" if role == "assistant" else f"{text}<|eot_id|>"

    return "<s>" + "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{body(role, text)}" for role, text in turns
    )  # fmt: skip


def _mistral(turns: Turns) -> str:
    """The system's text stands before the first question."""
    written, system = "<s>", ""
    for role, text in turns:
        if role == "system":
            system = f"{text}\n\n"
        elif role == "user":
            written, system = f"{written}[INST] {system}{text} [/INST]", ""
        else:
            written += f"[[ {text}</s>]]"
    return written


def _gemma(turns: Turns) -> str:
    def body(role: str, text: str) -> str:
        return f"model\n[[{text}<end_of_turn>]]" if role == "assistant" else f"user\n{text}<end_of_turn>"

    return "<s>" + "".join(f"<start_of_turn>{body(role, text)}\n" for role, text in turns)


def _zephyr(turns: Turns) -> str:
    def body(role: str, text: str) -> str:
        return f"[[{text}</s>]]" if role == "assistant" else f"{text}</s>"

    return "".join(f"<|{role}|>\n{body(role, text)}\n" for role, text in turns)


STYLES = {
    "chatml": Style(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "<GEN>{{ m['content'] + '<|im_end|>' }}</GEN>{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        _chatml,
    ),
    "llama3": Style(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{% if m['role'] == 'assistant' %}<GEN>{{ m['content'] | trim + '<|eot_id|>' }}</GEN>"
        "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        _llama3,
    ),
    "mistral": Style(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
        "{% else %}<GEN>{{ ' ' + m['content'] + eos_token }}</GEN>{% endif %}{% endfor %}",
        ("[INST]", "[/INST]"),
        _mistral,
    ),
    "gemma": Style(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
        "{% if m['role'] == 'assistant' %}<GEN>{{ m['content'] | trim + '<end_of_turn>' }}</GEN>"
        "{% else %}{{ m['content'] | trim + '<end_of_turn>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        _gemma,
        takes_system=False,
    ),
    "zephyr": Style(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' }}"
        "<GEN>{{ m['content'] + eos_token }}</GEN>{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}"
        "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        (),
        _zephyr,
    ),
}
