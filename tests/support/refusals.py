"""What users are told when something cannot be done."""

import pytest

from adalora_dist.io.errors import UserError


def refusal(action, *arguments) -> str:
    """The message of the ``UserError`` that ``action`` raises: one line."""
    with pytest.raises(UserError) as caught:
        action(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message
