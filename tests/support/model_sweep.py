"""Every text model class of transformers: adapted, one step, merged, loaded; what came of it is docs/models.md.

PYTHONPATH=. python -m tests.support.model_sweep [NAME ...]      some classes, on the console
PYTHONPATH=. python -m tests.support.model_sweep --write         all of them, into docs/models.md
"""

from __future__ import annotations

import logging
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from adalora_dist.artifacts.export import merge, task_settings
from adalora_dist.io.errors import UserError
from adalora_dist.methods import method_for
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.protocol import others_trained, trained_parameters
from adalora_dist.tasks.losses import decoder_start_token
from adalora_dist.tasks.reading_ahead import refuse_reading_ahead
from tests.support.models import config
from tests.support.paths import ROOT
from tests.support.tiny_any import VOCABULARY, CannotBeTiny, tiny_model

TABLE = ROOT / "docs" / "models.md"
SECONDS = 20
"""Of the processor's time, for one class."""
AUTO_CLASSES = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
WORKS, ADAPTS, REFUSED, NOT_TRIED, FAILS = "works", "adapts, no recipe", "refused", "not tried", "fails"
KINDS = (WORKS, ADAPTS, REFUSED, FAILS, NOT_TRIED)
LATENT = dict(num_key_value_heads=4, head_dim=8)
MAMBA2 = dict(mamba_n_heads=4, mamba_d_head=16, mamba_expand=2, mamba_d_ssm=64)
CHANGES: dict[str, dict[str, Any]] = {
    "Jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
                  use_mamba_kernels=False, mamba_dt_rank=4),
    **dict.fromkeys(("AXK", "BailingHybrid", "DeepseekV3", "Glm4MoeLite", "GlmMoeDsa"), LATENT),
    **dict.fromkeys(("KimiLinear", "MiniCPM3", "Youtu"), LATENT),
    "DeepseekV2": LATENT | dict(num_experts_per_tok=2, n_routed_experts=4, topk_method="greedy"),
    "Dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1,
                  n_group=1, topk_group=1),
    "Lfm2Moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "Mamba2": dict(num_heads=8, head_dim=8, expand=2, n_groups=1),
    "Bamba": MAMBA2,
    "FalconH1": MAMBA2,
    "GraniteMoeHybrid": MAMBA2,
    "HunYuanDenseV1": dict(head_dim=8, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "HunYuanMoEV1": dict(head_dim=8, rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    "Ministral": dict(head_dim=8),
    "Nemotron": dict(head_dim=8),
    "XLNet": dict(d_model=32, n_head=4, d_head=8),
    "Esm": dict(vocab_size=VOCABULARY),
    "ReformerModelWithLMHead": dict(is_decoder=True, axial_pos_embds=False),
    "Reformer": dict(axial_pos_embds=False),
}  # fmt: skip
"""What a class needs besides small numbers, by the start of its name."""


class Outcome(NamedTuple):
    """Of one class."""

    result: str
    detail: str
    """Matrices adapted; in one line why not, or why recipes refuse what is otherwise right."""


def class_names(auto_class: str) -> list[str]:
    """Every class that an Auto class can make."""
    entries = AUTO_CLASSES[auto_class].values()
    names = {name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)}
    return sorted(name for name in names if hasattr(transformers, name))


def outcome_of(class_name: str, auto_class: str) -> Outcome:
    """Adapt all-linear, take a step, merge, load in plain transformers, compare; what recipes say of the class."""
    model_class = getattr(transformers, class_name)
    if model_class.main_input_name != "input_ids":
        return Outcome(NOT_TRIED, f"takes {model_class.main_input_name}")
    changes = next((value for start, value in CHANGES.items() if class_name.startswith(start)), {})
    try:
        with _limit(SECONDS), tempfile.TemporaryDirectory() as folder:
            return _run(model_class, changes, Path(folder), auto_class)
    except CannotBeTiny as error:
        return Outcome(NOT_TRIED, str(error))
    except UserError as error:
        return Outcome(REFUSED, _short(error))
    except _TooLong:
        return Outcome(NOT_TRIED, f"takes more than {SECONDS} s")
    except Exception as error:  # noqa: BLE001
        return Outcome(FAILS, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")


def _run(model_class: Any, changes: dict[str, Any], folder: Path, auto_class: str) -> Outcome:
    base = folder / "base"
    try:
        tiny_model(model_class, **changes).save_pretrained(base)
        model = model_class.from_pretrained(base).eval()
        model.config.use_cache = False
        batch = _batch(model)
        plain = _logits(model, batch)
    except _TooLong:
        raise
    except CannotBeTiny:
        raise
    except Exception as error:  # noqa: BLE001
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
        raise CannotBeTiny(f"by itself: {reason}") from error
    head = ("task-head",) if auto_class == "AutoModelForSequenceClassification" else ()
    settings = config(targets=("all-linear",), train_modules=head)
    adapters = adapt(model, settings, 0)
    nn.init.ones_(model.adalora.lam)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    _logits(model, batch).float().square().mean().backward()
    idle = [adapter.name for adapter in adapters if adapter.P.grad is None or not adapter.P.grad.any()]
    optimizer.step()
    with torch.no_grad():
        expected = _logits(model, batch)
    whole = trained_parameters(model)
    updates = method_for(settings).updates(
        {a.name: a.description() for a in adapters}, {a.name: a.held() for a in adapters}, None,
        lambda name: whole[name].detach() if name in whole else None,
    )  # fmt: skip
    trained = {name: p.detach() for name, p in others_trained(model)}
    merge(updates, base, folder / "merged", trained=trained, task=task_settings(model), show_progress=False)
    again = model_class.from_pretrained(folder / "merged").eval()
    with torch.no_grad():
        difference = (_logits(again, batch) - expected).abs().max()
    moved = (expected - plain).abs().max()
    if not difference <= 1e-4 + 1e-2 * moved:
        return Outcome(FAILS, f"the merged model's logits are {difference:.1e} off; training moved them {moved:.1e}")
    if len(idle) == len(adapters):
        return Outcome(FAILS, "no adapter gets a gradient")
    idle = [name for name in idle if "expert" not in name]  # no token may have been sent there
    count = f"{len(adapters)}, {len(idle)} without part in this text" if idle else f"{len(adapters)}"
    try:
        _ask_recipes(again, auto_class)
    except UserError as error:
        return Outcome(ADAPTS, f"{error} (matrices adapted: {count})")
    return Outcome(WORKS, count)


def _ask_recipes(model: Any, auto_class: str) -> None:
    """What recipes for the Auto class ask a model itself, whatever the data are, before the first step.

    Raises:
        UserError: they refuse it.
    """
    if auto_class == "AutoModelForCausalLM":
        refuse_reading_ahead(model, is_precise=True)
    elif auto_class == "AutoModelForSeq2SeqLM":
        decoder_start_token(model)


def _short(error: UserError) -> str:
    return re.sub(r"/\S*/(base|merged)", r"\1", str(error))[:160]


def _batch(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, VOCABULARY - 4, (2, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        if isinstance(eos := model.config.eos_token_id, int):
            ids[:, -1] = eos
        if "SequenceClassification" not in type(model).__name__:
            batch["decoder_input_ids"] = ids
    return batch


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)  # for models that draw numbers in evaluation as well
    return model(**batch).logits


class _TooLong(Exception):
    """Of one class."""


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def outcomes_of(auto_class: str) -> dict[str, Outcome]:
    """Of every class that an Auto class can make."""
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    return {name: outcome_of(name, auto_class) for name in class_names(auto_class)}


def document(outcomes: dict[str, dict[str, Outcome]]) -> str:
    """docs/models.md, from the outcomes of each Auto class."""
    lines = [
        "# Models",
        "",
        f"Every class that three Auto classes of transformers {transformers.__version__} can make, tiny, with random",
        "weights: all-linear adapted (classifiers with `task-head`), one step, merged into the files, loaded in",
        "plain transformers, logits equal. Written by `python -m tests.support.model_sweep --write`; `pytest -m slow`",
        "compares.",
        "",
        f"*{ADAPTS}*: all of that holds, in a loop of your own. Recipes refuse the class as it comes, before the first",
        "step, for the reason that is given, which is what their own check says.",
    ]
    for auto_class, of_class in outcomes.items():
        counts = {kind: sum(o.result == kind for o in of_class.values()) for kind in KINDS}
        lines += ["", f"## {auto_class}", "", ", ".join(f"{n} {kind}" for kind, n in counts.items() if n) + ".", ""]
        works = [f"{name} ({o.detail})" for name, o in of_class.items() if o.result == WORKS]
        lines += [f"Works (matrices adapted): {', '.join(works)}."]
        rest = [(name, o) for name, o in of_class.items() if o.result != WORKS]
        if rest:
            lines += ["", "| class | | why |", "| --- | --- | --- |"]
            lines += [f"| {name} | {o.result} | {o.detail.replace('|', '/')} |" for name, o in rest]
    return "\n".join(lines) + "\n"


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if "--write" not in sys.argv:
        for name in sys.argv[1:]:
            for auto_class in AUTO_CLASSES:
                if name in class_names(auto_class):
                    print(name, auto_class, *outcome_of(name, auto_class), flush=True)
        return
    outcomes = {}
    for auto_class in AUTO_CLASSES:
        outcomes[auto_class] = outcomes_of(auto_class)
        for name, outcome in outcomes[auto_class].items():
            if outcome.result != WORKS:
                print(name, *outcome, flush=True)
    Path(TABLE).write_text(document(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
