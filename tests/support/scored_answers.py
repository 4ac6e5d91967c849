"""Answers to questions, scored by hand."""

STORED = [
    ("the Denver Broncos", ["Denver Broncos", "Broncos"], (1, 1), (1, 1)),
    ("Broncos of Denver", ["Denver Broncos"], (0, 4 / 5), (0, 4 / 5)),
    ("Santa Clara, California", ["Levi's Stadium", "Santa Clara"], (0, 4 / 5), (0, 4 / 5)),
    ("very very good", ["very good", "good"], (0, 4 / 5), (0, 4 / 5)),
    ("1989", ["1990"], (0, 0), (0, 0)),
    ("The", ["a"], (1, 0), None),  # both normalise to nothing; v2.0: in test_squad.py
    ("", ["Paris"], (0, 0), (0, 0)),
    ("", [], None, (1, 1)),
    ("Paris", [], None, (0, 0)),
]
"""(predicted, right answers, exact and F1 in v1.1, exact and F1 in v2.0); None: no such case there."""
