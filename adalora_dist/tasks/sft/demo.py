"""The built-in conversations: a harbour office that answers from a timetable, in one form, to show instruction tuning.

The office's first message lists ships, each with a time and a quay; a guest asks about one of them, and often about a
second one. A right reply is ``Oak Swan: quay 3, 09:40.`` and nothing else: the facts are in the timetable, and the form
is what a model learns. Ships of the validation conversations are in no training conversation, so a right reply there
has not been learnt by heart. Everything follows from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Literal

Split = Literal["train", "validation"]

NUM_CONVERSATIONS: dict[Split, int] = {"train": 320, "validation": 32}
NUM_SHIPS = 3
"""In a timetable."""
VALIDATION_SHARE = 0.2
SEED = 4
FIRST = "Oak Red Blue Stone Silver Lucky Green Golden Little Grey".split()
SECOND = "Swan Anchor Gull Bell Heron Lantern Wave Star Otter Pearl".split()
QUESTIONS = (
    "Where and when does the {} leave?",
    "I am booked on the {}. Where do I have to be, and when?",
    "Which quay for the {}, and what time?",
    "When does the {} go, and from where?",
)
FOLLOW_UPS = ("And the {}?", "Thanks. The {} as well, please.", "What about the {}?")


def ships_of(split: Split) -> list[str]:
    """Names of the ships that conversations of this split are about."""
    ships = [f"{first} {second}" for first in FIRST for second in SECOND]
    random.Random(f"{SEED} ships").shuffle(ships)
    num_validation = round(VALIDATION_SHARE * len(ships))
    return ships[:num_validation] if split == "validation" else ships[num_validation:]


def reply_about(ship: str, departure: tuple[str, int]) -> str:
    """The right reply, of a ship's (time, quay)."""
    time, quay = departure
    return f"{ship}: quay {quay}, {time}."


def demo_conversations(split: Split) -> list[dict[str, Any]]:
    """Rows in the form ``messages``; always the same."""
    conversations = _conversations(split)
    return [next(conversations) for _ in range(NUM_CONVERSATIONS[split])]


def _conversations(split: Split) -> Iterator[dict[str, Any]]:
    draw, ships = random.Random(f"{SEED} {split}"), ships_of(split)
    while True:
        listed = draw.sample(ships, NUM_SHIPS)
        times = [f"{draw.randrange(6, 22):02}:{draw.randrange(0, 60, 5):02}" for _ in listed]
        departures = {ship: (time, draw.randrange(1, 10)) for ship, time in zip(listed, times, strict=True)}
        table = "; ".join(f"{ship} at {time} from quay {quay}" for ship, (time, quay) in departures.items())
        messages = [{"role": "system", "content": f"Harbour office. Today: {table}."}]
        for turn, ship in enumerate(draw.sample(listed, draw.choice((1, 2)))):
            question = draw.choice(FOLLOW_UPS if turn else QUESTIONS).format(ship)
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": reply_about(ship, departures[ship])},
            ]
        yield {"messages": messages}
