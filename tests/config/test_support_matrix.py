"""The table of what goes together in docs/methods.md is that of the code and the tests as they are."""

from adalora_dist.config.methods import METHODS
from tests.support.paths import ROOT
from tests.support.support_matrix import BEGIN, COMMON, END, ENGINES, OWN, PAGE, in_common, page_with_matrix, row_of


def test_the_page_has_the_table_as_it_is_now() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert page_with_matrix(page) == page, "python -m tests.support.support_matrix --write"


def test_every_method_has_tests_that_start_engines() -> None:
    assert {*in_common()} | {*OWN} == {*METHODS} and (ROOT / COMMON).is_file()
    for method in METHODS:
        assert any(row_of(method)[engine] for engine in ENGINES), method


def test_cells_are_those_of_refusals() -> None:
    assert row_of("dora")["int8"] == row_of("full")["nf4"] == row_of("bitfit")["fp4"] == "–"
    assert row_of("lora")["nf4"] == row_of("dora")["peft"] == row_of("vera")["lora"] == "yes"
    assert row_of("dora")["lora"] == row_of("dvora")["peft"] == row_of("full")["`--budget`"] == "–"
