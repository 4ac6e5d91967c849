"""Every text model class of transformers, adapted, stepped, merged and loaded: as docs/models.md says."""

import pytest

from tests.support.model_sweep import (
    ADAPTS,
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
    [auto_class] = [name for name in AUTO_CLASSES if class_name in class_names(name)]
    assert outcome_of(class_name, auto_class) == Outcome(WORKS, str(num_matrices))


@pytest.mark.parametrize(
    ("class_name", "auto_class", "reason"),
    [("BertLMHeadModel", "AutoModelForCausalLM", "reads a text both ways"),
     ("VoxtralForConditionalGeneration", "AutoModelForSeq2SeqLM", "has no encoder for the text")],
)  # fmt: skip
def test_what_recipes_refuse_does_not_stand_as_working(class_name, auto_class, reason):
    outcome = outcome_of(class_name, auto_class)
    assert outcome.result == ADAPTS and reason in outcome.detail
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {class_name} |")]
    assert f"| {class_name} | {ADAPTS} | {outcome.detail} |" in rows


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
