"""Settings that nothing reads because of the value of another one. Never imports torch.

Whoever turns off what is on by default (``orthogonality`` 0, ``checkpoint_every`` 0, ``show_samples`` 0, beams)
may leave its details where they stand: in a shipped file, for one. What is refused was set for what does not happen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class _Unread(NamedTuple):
    section: str
    names: str
    why: str
    remedy: str


def check_unread(run: Any) -> None:
    """Raise where a setting that nothing would read is another than the recipe's default.

    Args:
        run: the ``RunConfig``.

    Raises:
        ValueError: one line with the settings, the reason and the remedy.
    """
    for rule in _rules(run):
        section, defaults = getattr(run, rule.section), _defaults(run, rule.section)
        for name in rule.names.split():
            value, default = getattr(section, name, None), getattr(defaults, name, None)
            if value != default:
                raise ValueError(
                    f"{name} {_text(value)} {rule.why}; {rule.remedy}, or {name} to its default, {_text(default)}"
                )


def _rules(run: Any) -> Iterator[_Unread]:
    train, evaluation, data = run.train, run.evaluation, getattr(run, "data", None)
    if train.lr_schedule == "constant":
        why = "with lr_schedule constant: the learning rate does not decay"
        yield _Unread("train", "lr_end_ratio", why, "set lr_schedule to linear or cosine")
    if not run.export.push_to_hub:
        why = "without push_to_hub: nothing is uploaded"
        yield _Unread("export", "push_public push_revision", why, "set push_to_hub to a repository")
    if getattr(evaluation, "num_beams", None) == getattr(_defaults(run, "evaluation"), "num_beams", None) == 1:
        why = "with num_beams 1: one beam is compared with no other"
        yield _Unread("evaluation", "length_penalty", why, "set num_beams to 2 or more")
    if getattr(data, "task", None) == "v1.1":
        why = "with task v1.1: every question has an answer"
        yield _Unread("data", "null_threshold", why, "set task to v2.0")
    if not getattr(evaluation, "answer", "a file"):
        why = "without answer: there are no questions to be answered"
        yield _Unread("evaluation", "answer_tokens", why, "set answer to a file")


def _defaults(run: Any, section: str) -> Any:
    return type(run).model_fields[section].default


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
