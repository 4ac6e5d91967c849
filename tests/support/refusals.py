"""What users are told when something cannot be done."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from adalora_dist.io.errors import UserError


def refusal(action, *arguments) -> str:
    """The message of the ``UserError`` that ``action`` raises: one line."""
    with pytest.raises(UserError) as caught:
        action(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@contextmanager
def refused(reason: str) -> Iterator[None]:
    """What is inside raises a ``UserError`` of one line that matches ``reason``."""
    with pytest.raises(UserError, match=reason) as caught:
        yield
    assert "\n" not in str(caught.value)
