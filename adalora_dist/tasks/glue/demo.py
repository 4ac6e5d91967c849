"""Built-in sentences for the encoder recipe: is something praised or blamed? In the form of SST-2, but not SST-2.

Every word that carries the judgement occurs in one split only, and so does every thing that is judged: what the
training rows teach is the question, and the answer for unseen words must come from what the encoder knows of them.
Half of the sentences turn their word round ("not", "far from", "anything but").
"""

from __future__ import annotations

import random
from pathlib import Path

from adalora_dist.tasks.rows.demo_folder import demo_folder

TASK = "sst2"
NUM_TRAIN, NUM_DEV = 1200, 400

# Judgements come in rough pairs of opposites, so that the splits, cut by pairs, have as many good as bad words.
_PAIRS = (
    "wonderful terrible, delicious disgusting, brilliant stupid, charming rude, excellent awful, pleasant nasty, "
    "beautiful ugly, honest dishonest, generous greedy, elegant clumsy, fresh rotten, reliable unreliable, kind cruel, "
    "splendid dreadful, superb miserable, graceful awkward, fascinating boring, comfortable uncomfortable, "
    "friendly hostile, skilful incompetent, tidy filthy, lively dull, wise foolish, delightful horrible, "
    "impressive disappointing, refreshing tiresome, perfect flawed, safe dangerous, useful useless, fair unfair, "
    "marvellous atrocious, helpful careless, amusing tedious, polite insulting, lovely hideous, healthy harmful, "
    "convincing ridiculous, thoughtful thoughtless, magnificent pathetic, enjoyable annoying"
)
_THINGS = (
    "soup, bread, hotel, waiter, film, novel, teacher, garden, concert, painting, chair, jacket, train, museum, "
    "doctor, cake, song, guide, kitchen, lecture, actor, poem, bicycle, holiday, market, coffee, bridge, letter, "
    "dentist, party, camera, restaurant, neighbour, castle, lawyer, breakfast, play, phone, barber, park"
)
_PLAIN = (
    "The {thing} was {word}.",
    "Everyone said that the {thing} was {word}.",
    "What a {word} {thing} we had!",
    "I found the {thing} quite {word}.",
    "In my opinion the {thing} is {word}.",
    "It was a {word} {thing} from the first minute to the last.",
)
_TURNED = (
    "The {thing} was not {word} at all.",
    "I would never call the {thing} {word}.",
    "The {thing} was anything but {word}.",
    "They promised a {word} {thing}, but that is not what we got.",
    "The {thing} is far from {word}.",
    "Nobody found the {thing} {word}.",
)


def demo_sentences(split: str, seed: int = 0) -> list[dict[str, object]]:
    """Rows {"sentence", "label"} (1: praise) of ``train`` or ``dev``; half of each label, half of each form."""
    order = random.Random(f"words {seed}")
    pairs = [pair.split() for pair in _PAIRS.split(", ")]
    things = _THINGS.split(", ")
    order.shuffle(pairs)
    order.shuffle(things)
    cut = slice(0, 30) if split == "train" else slice(30, 40)
    draw = random.Random(f"{split} {seed}")
    rows: list[dict[str, object]] = []
    seen: set[str] = set()
    while len(rows) < (NUM_TRAIN if split == "train" else NUM_DEV):
        label, is_turned = len(rows) % 2, len(rows) // 2 % 2
        template = draw.choice(_TURNED if is_turned else _PLAIN)
        word = draw.choice(pairs[cut])[label if is_turned else 1 - label]  # a pair is (good, bad)
        sentence = _with_article(template.format(thing=draw.choice(things[cut]), word=word))
        if sentence not in seen:
            seen.add(sentence)
            rows.append({"sentence": sentence, "label": label})
    return rows


def _with_article(sentence: str) -> str:
    """'a' becomes 'an' before a vowel; 'a useful' and 'a useless' stay."""
    words = sentence.split(" ")
    for index, word in enumerate(words[:-1]):
        follows = words[index + 1]
        if word == "a" and follows[0] in "aeiou" and not follows.startswith("use"):
            words[index] = "an"
    return " ".join(words)


def demo_sentences_folder() -> Path:
    """A data folder with the built-in sentences as task sst2, in the user's cache."""
    return demo_folder("demo-sentences", {f"{TASK}/{split}.jsonl": demo_sentences(split) for split in ("train", "dev")})
