"""The built-in text: short stories of a village, to show that a model learns to write from nothing.

A story follows two people, an animal and a thing from place to place. Who has the thing, where everybody is and what
was lost is kept up from sentence to sentence, so there is something to learn beyond the order of words. Everything
follows from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

NUM_STORIES = 6000
SEED = 7
PEOPLE = "Anna Bram Clara Dirk Elsa Finn Greta Hugo Ida Jonas Karla Lars Mina Nils Olga Peter".split()
ANIMALS = "cat dog goat hen horse donkey goose pig".split()
THINGS = "basket lantern kettle book ladder rope blanket hammer bell bucket map whistle".split()
PLACES = "mill barn bridge market harbour church orchard forge well meadow school bakery".split()
COLOURS = "red blue green old small heavy new wooden grey yellow".split()
WEATHER = ("It was raining.", "The sun was shining.", "A cold wind came up.", "There was fog over the fields.")


def demo_stories(num_stories: int = NUM_STORIES) -> Iterator[str]:
    """Stories of about 90 words; always the same."""
    draw = random.Random(SEED)
    for _ in range(num_stories):
        yield _story(draw)


def _story(draw: random.Random) -> str:
    (first, second), animal = draw.sample(PEOPLE, 2), draw.choice(ANIMALS)
    thing, here, there = f"{draw.choice(COLOURS)} {draw.choice(THINGS)}", *draw.sample(PLACES, 2)
    owner, other = first, second
    lines = [
        f"{first} lived near the {here} with a {animal}.",
        draw.choice(WEATHER),
        f"One morning {first} took the {thing} and went to the {there}.",
        f"{second} was at the {there}, too.",
    ]
    place = there
    for _ in range(draw.randrange(3, 6)):
        turn = draw.randrange(5)
        if turn == 0:
            lines.append(f'"May I have the {thing}?" asked {other}. {owner} gave it to {other}.')
            owner, other = other, owner
        elif turn == 1:
            place = draw.choice([p for p in PLACES if p != place])
            lines.append(f"Then {first} and {second} walked to the {place}, and the {animal} came after them.")
        elif turn == 2:
            lines.append(f'"Where is the {animal}?" asked {second}. "At the {place}," said {first}.')
        elif turn == 3:
            lines.append(f"{owner} put the {thing} down at the {place} and looked at the {animal}.")
        else:
            lines.append(f"{other} was tired, so {owner} carried the {thing}.")
    lines.append(f"In the evening {owner} still had the {thing}, and they all went home from the {place}.")
    return " ".join(lines)
