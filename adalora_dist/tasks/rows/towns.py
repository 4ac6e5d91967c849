"""Invented towns, split so that no test town is trained on."""

from __future__ import annotations

import random
from typing import Literal

Split = Literal["train", "test"]

SEED = 9

TEST_SHARE = 0.25
"""Share of the towns that only test summaries name."""

TOWNS = """
    Aldmoor Brinley Carstow Denholt Elmsford Farwick Glenbury Hartsea Inverley Jarrow Kelsby Lindmere Marlow Northam
    Oakhurst Penwick Quorley Redhill Stanton Thornby Upfield Varley Westmere Yarrow""".split()


def towns_of(split: Split) -> list[str]:
    """The towns that summaries of this split name."""
    towns = list(TOWNS)
    random.Random(f"{SEED} towns").shuffle(towns)
    num_test = round(TEST_SHARE * len(towns))
    return towns[:num_test] if split == "test" else towns[num_test:]
