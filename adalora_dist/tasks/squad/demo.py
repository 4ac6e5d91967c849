"""Built-in passages for the question-answering recipe, in the form of SQuAD, but not SQuAD.

Each passage tells of two people what they do, where they live and what they own; a question asks for one of these of
one of them. So the right kind of word alone is right in half of the cases. Names, jobs, places and things of the
evaluation passages do not occur in the training passages. For v2.0, every third question asks for what is not told.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from adalora_dist.tasks.rows.demo_folder import demo_folder

NUM_TRAIN, NUM_VALIDATION = 1500, 300

_NAMES = (
    "Anna, Boris, Clara, David, Elena, Felix, Greta, Hugo, Irene, Jonas, Karla, Leon, Maria, Nils, Olga, Peter, Rita, "
    "Simon, Tessa, Victor, Wanda, Xavier, Yvonne, Zoe, Arthur, Bianca, Conrad, Daria, Emil, Flora, Gustav, Helena"
)
_FACTS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "job": (
        ("{name} works as a {value}.", "By trade {name} is a {value}.", "{name} earns a living as a {value}."),
        "What is the job of {name}?",
        "baker, nurse, plumber, lawyer, teacher, painter, farmer, pilot, tailor, gardener, butcher, dentist, singer, "
        "carpenter, librarian, mechanic, cook, journalist, chemist, sailor",
    ),
    "place": (
        ("{name} lives in {value}.", "The home of {name} is in {value}.", "{name} has a small flat in {value}."),
        "Where does {name} live?",
        "Lisbon, Oslo, Prague, Dublin, Vienna, Athens, Warsaw, Naples, Geneva, Hamburg, Porto, Bergen, Krakow, Cork, "
        "Graz, Seville, Lyon, Bruges, Turin, Malmo",
    ),
    "thing": (
        ("{name} owns a {value}.", "The pride of {name} is a {value}.", "Last year {name} bought a {value}."),
        "What does {name} own?",
        "red bicycle, grey horse, wooden boat, silver watch, green tractor, black piano, small cottage, white van, "
        "golden ring, blue tent, leather sofa, stone cellar, yellow kite, heavy drum, glass lamp, brown donkey",
    ),
}


def demo_passages(split: str, with_unanswerable: bool, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of ``train`` or ``validation`` in the form of SQuAD v1.1, or v2.0 with questions that have no answer."""
    order = random.Random(f"words {seed}")

    def part(words: str) -> list[str]:
        listed = words.split(", ")
        order.shuffle(listed)
        cut = 3 * len(listed) // 4
        return listed[:cut] if split == "train" else listed[cut:]

    names = part(_NAMES)
    values = {kind: part(words) for kind, (_, _, words) in _FACTS.items()}
    draw = random.Random(f"{split} {seed}")
    rows = []
    for number in range(NUM_TRAIN if split == "train" else NUM_VALIDATION):
        people = draw.sample(names, 2)
        told = {
            (name, kind): value
            for kind in _FACTS
            for name, value in zip(people, draw.sample(values[kind], 2), strict=True)
        }
        who, what = draw.choice(people), draw.choice(list(_FACTS))
        is_answerable = not with_unanswerable or number % 3 != 0
        if not is_answerable:
            del told[who, what]
        sentences = [draw.choice(_FACTS[kind][0]).format(name=name, value=v) for (name, kind), v in told.items()]
        draw.shuffle(sentences)
        context = " ".join(sentences)
        texts, starts = [], []
        if is_answerable:
            sentence = next(s for s in sentences if who in s and told[who, what] in s)
            texts = [told[who, what]]
            starts = [context.index(sentence) + sentence.rindex(texts[0])]
        rows.append(
            {
                "id": f"{split}-{number}",
                "context": context,
                "question": _FACTS[what][1].format(name=who),
                "answers": {"text": texts, "answer_start": starts},
            }
        )
    return rows


def demo_passages_folder(task: str) -> Path:
    """A data folder with the built-in passages for v1.1 or v2.0, in the user's cache."""
    files = {f"{split}.jsonl": demo_passages(split, task == "v2.0") for split in ("train", "validation")}
    return demo_folder(f"demo-passages-{task}", files)
