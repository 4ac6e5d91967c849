"""The built-in reports: short made-up news, each with a one-line summary, to show summarisation without a network.

A report tells of one event in one town, in three to five sentences of random order, and mentions another town that has
nothing to do with it. Its summary names the event, the place, the town and the outcome, in words that are partly the
report's and partly not ("Nobody was hurt" becomes "no injuries").

No leakage: towns are split. A summary of a test report names a town that no training summary names, so a model has to
find it in the report; a memorised one scores nothing. Everything follows from a seed, the same on every machine.

These reports are not XSum, and scores on them say nothing about it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from adalora_dist.tasks.rows.towns import SEED, TOWNS, Split, towns_of

NUM_ROWS: dict[Split, int] = {"train": 640, "test": 64}


class Report(NamedTuple):
    """One row: the text and its summary."""

    document: str
    summary: str


PEOPLE = "Adams Bell Carter Dunn Ellis Ford Grant Hayes Irwin Jones Kerr Lamb Moore Nash Owen Price".split()
OFFICES = ("Mayor", "Inspector", "Councillor", "Doctor")
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PLACES = """
    bakery library school harbour station market museum bridge theatre stadium hospital hotel factory church farm
    airport""".split()
# What a report says happened, and the word that a summary has for it.
EVENTS = (
    ("a fire broke out at", "fire"),
    ("thieves broke into", "burglary"),
    ("rising water reached", "flood"),
    ("strong winds damaged", "storm"),
    ("workers walked out at", "strike"),
    ("hundreds of people marched to", "protest"),
    ("a lorry ran into", "crash"),
    ("the lights went out at", "blackout"),
    ("a large crowd sang at", "concert"),
    ("builders found old coins under", "discovery"),
)
# The sentence of the report, and the phrase of the summary.
OUTCOMES = (
    ("Nobody was hurt.", "no injuries"),
    ("Two people were taken to a doctor with small wounds.", "two hurt"),
    ("A dog that had been missing was found safe.", "dog safe"),
    ("It will stay shut for the rest of the week.", "closed all week"),
    ("The doors were open again after one hour.", "quickly reopened"),
    ("The repairs will cost a great deal of money.", "costly repairs"),
    ("Three men are being asked about it.", "three questioned"),
    ("Neighbours collected money to help.", "neighbours help"),
)
REMARKS = (
    "{office} {person} thanked everyone who came to help.",
    "{office} {person} said that it could have been worse.",
    "{office} {person} asked people to stay calm.",
    "{office} {person} will speak about it on {day}.",
)
ASIDES = (
    "Something like it happened in {other} a year ago.",
    "Visitors from {other} had left the evening before.",
    "The road to {other} was busy as on every {day}.",
    "It rained in {other} at the same time.",
)


def reports(seed: str, towns: list[str]) -> Iterator[Report]:
    """An endless stream of reports about ``towns``; other towns come in as asides."""
    draw = random.Random(seed)
    while True:
        town = draw.choice(towns)
        other = draw.choice([t for t in TOWNS if t != town])
        place, (happened, event), (outcome, short) = draw.choice(PLACES), draw.choice(EVENTS), draw.choice(OUTCOMES)
        names = {"other": other, "office": draw.choice(OFFICES), "person": draw.choice(PEOPLE)}
        sentences = [f"On {draw.choice(DAYS)} {happened} the {place} in {town}.", outcome]
        remark, aside = draw.choice(REMARKS), draw.choice(ASIDES)
        sentences += [
            s.format(**names, day=draw.choice(DAYS)) for s in draw.sample((remark, aside), draw.randint(1, 2))
        ]
        draw.shuffle(sentences)
        yield Report(" ".join(sentences), f"{town} {place} {event}, {short}.")


def demo_reports(split: Split) -> list[Report]:
    """The rows of one split, without repetition; always the same."""
    rows: dict[Report, None] = {}
    for report in reports(f"{SEED} {split}", towns_of(split)):
        rows[report] = None
        if len(rows) == NUM_ROWS[split]:
            break
    return list(rows)
