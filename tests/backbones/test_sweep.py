"""Every text model class of transformers, adapted, stepped, merged and loaded: as docs/models.md says."""

import pytest

from tests.support.model_sweep import (
    AUTO_CLASSES,
    FAILS,
    TABLE,
    WORKS,
    Outcome,
    class_names,
    document,
    outcome_of,
    outcomes_of,
)


@pytest.mark.parametrize(
    ("class_name", "num_matrices"),
    [("LlamaForCausalLM", 14), ("T5ForConditionalGeneration", 32), ("MambaForCausalLM", 2), ("MixtralForCausalLM", 12),
     ("BertForSequenceClassification", 13), ("T5ForSequenceClassification", 32)],
)  # fmt: skip
def test_some_classes_of_each_kind(class_name, num_matrices):
    assert outcome_of(class_name) == Outcome(WORKS, str(num_matrices))


def test_the_document_names_every_class():
    shown = TABLE.read_text(encoding="utf-8")
    for auto_class in AUTO_CLASSES:
        names = class_names(auto_class)
        assert len(names) > 10 and all(name in shown for name in names)
    assert not [line for line in shown.splitlines() if f"| {FAILS} |" in line]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_document_is_what_happens():
    assert document({auto_class: outcomes_of(auto_class) for auto_class in AUTO_CLASSES}) == TABLE.read_text("utf-8")
