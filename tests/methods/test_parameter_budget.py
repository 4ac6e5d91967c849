"""A budget of parameters: exact, maximal, the same way for every method, and refused by name where it cannot be met."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from adalora_dist.config.budget import parse_budget
from adalora_dist.config.flags import parse_config
from adalora_dist.config.methods import METHODS, LoraConfig, SizedConfig, method_config
from adalora_dist.config.sections import RunConfig
from adalora_dist.methods import method_for
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.parameter_budget import fit, within_budget
from adalora_dist.methods.protocol import adapters_of
from tests.support.expert_models import mixture
from tests.support.models import Net
from tests.support.refusals import refusal, refused
from tests.support.tiny_language_model import tiny_gpt2

SIZED = [name for name, config in METHODS.items() if issubclass(config, SizedConfig)]
UNSIZED = [name for name in METHODS if name not in SIZED]


def meta_net() -> Net:
    with torch.device("meta"):
        return Net(d=24, hidden=40)


def meta_model(method: str) -> Any:
    """What a method is tried on."""
    if method != "prefix":
        return meta_net()
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def section(method: str, **settings: Any) -> Any:
    fields = METHODS[method].model_fields
    where = {name: ("up", "down") for name in ("targets", "positions") if name in fields}
    return method_config(method, **where, **({"drop_layers": 1} if "drop_layers" in fields else {}), **settings)


def num_trained(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ----------------------------------------------------------------------------------------------------------- as written


@pytest.mark.parametrize(
    ("text", "of_a_million"),
    [("331776", 331_776), ("40K", 40_000), ("0.3M", 300_000), ("0.32%", 3_200), ("100%", 1_000_000), ("1.5k", 1_500),
     ("0.29 M", 290_000), ("0.57%", 5_700), ("7B", 7_000_000_000)],
)  # fmt: skip
def test_it_means_what_is_written(text: str, of_a_million: int) -> None:
    assert parse_budget(text).limit(1_000_000) == of_a_million


@pytest.mark.parametrize("text", ["", "M", "-3", "0", "0.5", "101%", "0%", "1e5", "3T", "nan"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no number of parameters: write 331776, 40K or 0.3M"):
        parse_budget(text)


# ------------------------------------------------------------------------------------------------- counts, and the best


@pytest.mark.parametrize("method", SIZED)
def test_counts_are_of_what_is_then_trained(method: str) -> None:
    sizes = method_for(section(method)).sizes(meta_model(method))
    for size in range(sizes.smallest, min(sizes.largest, 9) + 1):
        config = section(method, budget="1K").sized(sizes.settings(size))
        model = meta_model(method)
        adapt(model, config)
        if not config.adapts_ranks:
            assert num_trained(model) == sizes.count(size) > 0
        else:  # what is left in the end, spread evenly, and what no selection removes
            each = [adapter.part_size for adapter in adapters_of(model)]
            kept = num_trained(model) - sum(a.part_size * len(a.held()) for a in adapters_of(model))
            assert (kept > 0) == (method == "adadora")
            exact = kept + size * sum(each) / len(each)
            assert exact <= sizes.count(size) < exact + 1
            assert config.init_rank * len(each) >= config.target_budget == size


@pytest.mark.parametrize("method", SIZED)
def test_it_is_never_exceeded_and_nothing_larger_is_within_it(method: str) -> None:
    model = meta_model(method)
    sizes = method_for(section(method)).sizes(model)
    counts = [sizes.count(size) for size in range(sizes.smallest, sizes.largest + 1)]
    assert counts == sorted(counts)
    limits = sorted({limit for count in counts for limit in (count - 1, count, count + 1)})
    for limit in limits:
        best = max((count for count in counts if count <= limit), default=None)
        if best is None or limit > counts[-1]:
            continue
        fitted = fit(model, section(method, budget=str(limit)))
        assert fitted is not None and fitted.num_trained == best <= fitted.limit == limit
        larger = [count for count in counts if count > best]
        assert fitted.num_next == (larger[0] if larger else None)
        assert fitted.config == section(method, budget="9").sized(sizes.settings(sizes.smallest + counts.index(best)))


@pytest.mark.parametrize("method", SIZED)
def test_floors_and_ceilings_are_said_by_name(method: str) -> None:
    model = meta_model(method)
    sizes = method_for(section(method)).sizes(model)
    fewest, most = sizes.count(sizes.smallest), sizes.count(sizes.largest)
    for limit, word in ((fewest - 1, "few"), (sizes.count(sizes.largest + 1) + 1, "many")):
        text = refusal(within_budget, model, section(method, budget=str(limit)))
        assert text.startswith(f"budget={limit} ({limit:,} parameters): {method} cannot train so {word} in this model")
        assert f"{most:,}" in text if word == "many" else f"{fewest:,}" in text
        assert f"{fewest}..{most}" in text or fewest == most and "leave budget out" in text


def test_equal_budgets_are_equal() -> None:
    """Of the methods whose unit is small no one is further off than its unit."""
    model, found = meta_net(), {}
    for method in ("adalora", "lora", "lora_fa", "dora"):
        fitted = fit(model, section(method, budget="1500"))
        assert fitted is not None and fitted.num_next is not None and fitted.num_next > 1500
        found[method] = fitted.num_trained
    assert max(found.values()) <= 1500 < 2 * min(found.values())


def test_heads_are_counted_apart_and_shares_are_of_the_whole_model() -> None:
    model = meta_net()
    plain = fit(model, section("lora", budget="20%"))
    with_head = fit(model, section("lora", budget="20%", train_modules=("head",)))
    assert plain is not None and with_head is not None and plain.num_trained == with_head.num_trained
    assert plain.limit == sum(p.numel() for p in model.parameters()) // 5
    assert (plain.num_besides, with_head.num_besides) == (0, 24 * 3 + 3)
    assert with_head.as_sentence().endswith("; besides 75 in train_modules")
    assert plain.as_record() == {
        "budget": "20%", "limit": plain.limit, "num_trained": plain.num_trained, "num_besides": 0,
        "init_rank": plain.config.init_rank,
    }  # fmt: skip


def test_the_scale_of_the_branch_does_not_follow_the_rank() -> None:
    for rslora, budget in itertools.product((False, True), ("600", "2000")):
        plain = section("lora", alpha=16, rslora=rslora)
        sized = within_budget(meta_net(), section("lora", alpha=16, rslora=rslora, budget=budget))
        assert sized.init_rank != plain.init_rank and sized.scale == pytest.approx(plain.scale)


def test_without_a_budget_nothing_changes() -> None:
    for name in METHODS:
        config = section(name)
        assert fit(meta_net(), config) is None and within_budget(meta_net(), config) is config


def test_adapt_asks_for_sizes_first() -> None:
    with refused(r"budget=1K: sizes come first: adapt\(model, within_budget"):
        adapt(meta_net(), section("lora", budget="1K"))


def test_conv1d_counts_as_it_is() -> None:
    model = tiny_gpt2()
    config = within_budget(model, method_config("lora", budget="25%"))
    limit = sum(p.numel() for p in model.parameters()) // 4
    adapt(model, config)
    each = num_trained(model) // config.init_rank
    assert num_trained(model) <= limit < num_trained(model) + each


@pytest.mark.parametrize("targets", [("all-linear",), ("experts",)])
def test_every_expert_counts_in_a_model_that_is_not_frozen_yet(targets: tuple[str, ...]) -> None:
    model = mixture("qwen2_moe")
    experts = "model.layers.0.mlp.experts"
    settings: dict[str, Any] = {"budget": "40%", "targets": targets, "train_modules": (experts,)}
    fitted = fit(model, method_config("lora", **settings))
    assert fitted is not None
    adapt(model, fitted.config)
    assert num_trained(model) == fitted.num_trained + fitted.num_besides
    assert fitted.num_trained <= fitted.limit < fitted.num_next
    in_full = all(p.requires_grad for n, p in model.named_parameters() if n in (f"{experts}.gate_up_proj",))
    assert in_full == ("experts" not in targets) and (fitted.num_besides > 0) == in_full


# ---------------------------------------------------------------------------------------------------- flags and files


def run(*words: str) -> Any:
    return parse_config(RunConfig, list(words))


@pytest.fixture
def line_of(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line with which these flags are refused."""

    def line_of(*words: str) -> str:
        with pytest.raises(SystemExit):
            run(*words)
        [line] = capsys.readouterr().err.splitlines()
        return line.removeprefix("error: ")

    return line_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("adapter:\n  lora: {init_rank: 32, alpha: 64}\n  adalora: {init_rank: 48, target_rank: 32}\n")
    return path


def test_a_budget_on_the_command_line_is_over_the_ranks_of_a_file(file: Path) -> None:
    config = run("--config", str(file), "--method", "lora", "--budget", "0.3M").adapter
    assert isinstance(config, LoraConfig) and config.budget == "0.3M" and config.scale == 2  # that of the file
    assert run("--config", str(file), "--method", "lora", "--budget", "0.3M", "--alpha", "24").adapter == config
    assert run("--config", str(file), "--budget", "0.3M").adapter.scale == 16 / 48


def test_the_section_with_a_budget_can_be_written_and_read_again(tmp_path: Path, file: Path) -> None:
    config = run("--config", str(file), "--budget", "331776")
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert "init_rank" not in again.read_text() and run("--config", str(again)) == config


@pytest.mark.parametrize("words", [("--init-rank", "4"), ("--method", "adalora", "--target-budget", "9")])
def test_ranks_beside_a_budget_are_refused(words: tuple[str, ...], tmp_path: Path, line_of: Callable[..., str]) -> None:
    line = line_of("--budget", "0.3M", *words)
    assert f"budget 0.3M with {words[-2][2:].replace('-', '_')} {words[-1]}: both say how large" in line
    path = tmp_path / "both.yaml"
    path.write_text("adapter: {budget: 331776, lora: {init_rank: 4}}\n")
    assert "budget 331776 with init_rank 4" in line_of("--config", str(path), "--method", "lora")
    path.write_text("adapter: {budget: 331776}\n")
    assert f"budget 331776 with {words[-2][2:].replace('-', '_')}" in line_of("--config", str(path), *words)
    assert run("--config", str(path), "--init-rank", "9", "--budget", "none").adapter.init_rank == 9


@pytest.mark.parametrize("method", UNSIZED)
def test_methods_without_sizes_have_no_budget(method: str, line_of: Callable[..., str]) -> None:
    assert f"--budget 0.3M: method {method} has no budget" in line_of("--budget", "0.3M", "--method", method)


def test_what_is_no_budget_is_one_line(line_of: Callable[..., str]) -> None:
    assert line_of("--budget", "3T").startswith("--budget 3T: budget 3T is no number of parameters: write")
