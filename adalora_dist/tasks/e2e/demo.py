"""The built-in places: made-up inns and shops as lists of facts, each with descriptions, to show data-to-text.

A list of facts reads ``name[Oak Lamb], kind[inn], food[soup], price[low], town[Carstow], near[station]``; two sentences
describe it, in one of several wordings. Towns are split as those of the built-in reports are: a test list names a town
that no training list names. Everything follows from a seed. These are not the E2E data, and scores on them say nothing
about it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal

from adalora_dist.tasks.rows.towns import SEED, towns_of

Split = Literal["train", "test"]
Facts = dict[str, str]

NUM_LISTS: dict[Split, int] = {"train": 320, "test": 48}
NUM_DESCRIPTIONS = 2
"""Of each list: the training rows of a list, and the references of a test list."""

FIRST = "Oak Red Old Blue Stone Silver Lucky Green Golden Little".split()
SECOND = "Lamb Crown Anchor Lion Bell Barrel Rose Swan Mill Lantern".split()
CHOICES = {
    "kind": "inn cafe pub hotel".split(),
    "food": "soup fish pasta curry bread cheese".split(),
    "price": "low fair high".split(),
    "near": "station harbour market museum bridge church".split(),
}
OPENINGS = (
    "{name} is a {kind} in {town}, near the {near}.",
    "Near the {near} in {town} there is a {kind} called {name}.",
    "In {town}, {name} is the {kind} by the {near}.",
)
CLOSINGS = (
    "It serves {food} and its prices are {price}.",
    "You get {food} there, and prices are {price}.",
    "Prices are {price}, and there is {food}.",
)


def places(seed: str, towns: list[str]) -> Iterator[tuple[Facts, random.Random]]:
    """An endless stream of places in ``towns``, each with the generator to describe it with."""
    draw = random.Random(seed)
    while True:
        facts = {"name": f"{draw.choice(FIRST)} {draw.choice(SECOND)}"}
        facts |= {key: draw.choice(words) for key, words in CHOICES.items()} | {"town": draw.choice(towns)}
        yield facts, draw


def describe(facts: Facts, draw: random.Random) -> str:
    """Two sentences that say all the facts."""
    return f"{draw.choice(OPENINGS)} {draw.choice(CLOSINGS)}".format(**facts)


def demo_places(split: Split) -> list[tuple[str, str]]:
    """(list of facts, description) of one split, rows of one list in succession; always the same."""
    rows: dict[str, list[str]] = {}
    for facts, draw in places(f"{SEED} {split}", towns_of(split)):
        listed = ", ".join(f"{key}[{value}]" for key, value in facts.items())
        if listed not in rows:
            rows[listed] = []
            while len(rows[listed]) < NUM_DESCRIPTIONS:
                text = describe(facts, draw)
                rows[listed] += [text] if text not in rows[listed] else []
        if len(rows) == NUM_LISTS[split]:
            break
    return [(listed, text) for listed, texts in rows.items() for text in texts]
