"""``AdaLoraConfig.from_peft``: every field of PEFT's configuration means the same here, or is named."""

from __future__ import annotations

import dataclasses
import warnings

import peft
import pytest

from adalora_dist.config.methods import AdaLoraConfig
from adalora_dist.config.methods.peft_fields import OF_FILES, SAME, SELF_EVIDENT, TRANSLATED, UNUSED
from adalora_dist.io.errors import UserError
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")


def theirs(**fields) -> peft.AdaLoraConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.AdaLoraConfig(**{"total_step": 1000, "target_modules": ["v_proj", "q_proj"], **fields})


def ours(peft_config, **settings) -> AdaLoraConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AdaLoraConfig.from_peft(peft_config, **settings)


def test_fields_mean_the_same():
    taken = ours(
        theirs(
            init_r=6, target_r=4, lora_alpha=32, lora_dropout=0.1, tinit=200, tfinal=300, deltaT=10, beta1=0.8,
            beta2=0.9, orth_reg_weight=0.2, task_type="SEQ_CLS", modules_to_save=["embed_tokens"],
        )
    )  # fmt: skip
    assert taken == AdaLoraConfig(
        init_rank=6, target_rank=4, alpha=32, dropout=0.1, initial_warmup_steps=200, final_steps=300,
        mask_interval_steps=10, beta1=0.8, beta2=0.9, orthogonality=0.2, targets=("q_proj", "v_proj"), start="paper",
        orthogonality_form="norm", importance_order="after", train_modules=("embed_tokens", "task-head"),
    )  # fmt: skip
    assert taken.scale == 32 / 6


def test_defaults_targets_and_what_the_caller_sets():
    assert ours(theirs(target_modules="all-linear")).targets == ("all-linear",)
    assert ours(theirs(target_modules=r".*\.q_proj")).targets == (r".*\.q_proj",)
    assert ours(theirs(target_modules=None), targets=("k_proj",)).targets == ("k_proj",)
    matched = ours(theirs(), start="matched", target_rank=2)
    assert matched.start == "matched" and matched.target_rank == 2 and matched.regulariser == "directions"
    assert ours(theirs(), importance="magnitude").importance_order == "before"  # it has no averages
    assert ours(theirs(task_type="CAUSAL_LM")).train_modules == ()
    with pytest.raises(UserError, match=r"target_modules is None.*pass targets="):
        ours(theirs(target_modules=None))


def test_fields_without_effect_are_named():
    with pytest.warns(UserWarning, match=r"not honoured: total_step=1000 \(.*\), r=4 \(.*init_r.*\), use_rslora=True"):
        AdaLoraConfig.from_peft(theirs(r=4, use_rslora=True))


CHANGED = {
    "exclude_modules": ["lm_head"], "bias": "all", "init_lora_weights": False, "layers_to_transform": [0],
    "rank_pattern": {"q": [True]}, "alpha_pattern": {"q": 3}, "trainable_token_indices": [1], "lora_bias": True,
    "layer_replication": [(0, 1)], "target_parameters": ["w"], "ensure_weight_tying": True,
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGED)
def test_what_changes_the_function_is_refused(field):
    with pytest.raises(UserError, match=f"not honoured here: {field}="):
        ours(theirs(**{field: CHANGED[field]}))


def test_all_of_it_in_one_line():
    with pytest.raises(UserError, match=r"alpha_pattern=\{'q': 3\}, bias='all'") as error:
        ours(theirs(bias="all", alpha_pattern={"q": 3}))
    assert "\n" not in str(error.value)


def test_another_configuration_is_refused():
    for other in (peft.LoraConfig(), {"init_r": 3}, None):
        with pytest.raises(UserError, match=r"needs a peft.AdaLoraConfig, not a .*: for LoRA write"):
            AdaLoraConfig.from_peft(other)


def test_every_field_of_this_version_of_peft_is_in_the_table():
    """All of them are honoured, named, or refused as soon as they are set; the page says which."""
    known = {*SAME, *TRANSLATED, *UNUSED, *OF_FILES, *SELF_EVIDENT}
    fields = {field.name for field in dataclasses.fields(peft.AdaLoraConfig)}
    assert known <= fields
    for field in fields:
        assert f"`{field}`" in PAGE, field
