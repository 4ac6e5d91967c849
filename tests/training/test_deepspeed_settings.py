"""What a stranger's DeepSpeed configuration asks for: done, or refused in one line, on one process's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3Config, LlamaConfig

from adalora_dist import attach, parameter_groups
from adalora_dist.config.sections import RunConfig, TrainConfig
from adalora_dist.training.asked_for import check_asked_for, engine_asked_for, precision_asked_for
from adalora_dist.training.deepspeed_keys import FILLED, KEYS, REFUSED
from adalora_dist.training.deepspeed_settings import check_in_any_loop, fill_sizes, filled, not_used, settings_asked_for
from adalora_dist.training.engine import with_precision
from adalora_dist.training.plan.cluster import Cluster
from adalora_dist.training.trainer_callback import AdaLoraCallback
from tests.support.paths import DS_CONFIGS
from tests.support.ranks import import_deepspeed, import_package, run_ranks
from tests.support.recipe_runs import Run, run_recipe
from tests.support.refusals import refusal, refused
from tests.support.tiny_project import Project
from tests.support.trainer_runs import SETTINGS, arguments, model_with_adapters, trainer_of

deepspeed = import_deepspeed()
import_package()

SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
CPU = {"device": "cpu", "pin_memory": True}
ZERO2 = {
    "stage": 2, "allgather_partitions": True, "allgather_bucket_size": 5e8, "overlap_comm": True,
    "reduce_scatter": True, "reduce_bucket_size": "auto", "contiguous_gradients": True, "round_robin_gradients": True,
}  # fmt: skip
ZERO3 = {
    "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}  # fmt: skip
FP16 = {
    "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
    "min_loss_scale": 1,
}  # fmt: skip
OF_STAGE_3 = {"stage3_prefetch_bucket_size": 9_000, "stage3_param_persistence_threshold": 1_000}
OFF = {
    "flops_profiler": {"enabled": False}, "tensorboard": {"enabled": False}, "amp": {"enabled": False},
    "curriculum_learning": {"enabled": False}, "elasticity": {"enabled": "auto"}, "sparse_gradients": False,
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
    "tensor_parallel": {"autotp_size": 1}, "_comment": "from a page",
}  # fmt: skip


def of(zero: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    """A file as pages have them: "auto" wherever a program can fill it in."""
    return {"zero_optimization": zero or ZERO2, **dict.fromkeys(SIZES, "auto"), "fp16": FP16, **others}


def environment_of(folder: Path, content: dict[str, Any] | str, **others: str) -> dict[str, str]:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "ds.json").write_text(text)
    stage = 3 if '"stage": 3' in text else 0
    return {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder / "ds.json"),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(stage == 3).lower(), **others,
    }  # fmt: skip


def without_auto(settings: Any) -> bool:
    return all(
        without_auto(value) if isinstance(value, dict) else value != "auto" or f"zero_optimization.{name}" in FILLED
        for name, value in settings.items()
    )


@pytest.mark.parametrize(
    "content",
    [
        of(), of(ZERO3), of({**ZERO2, "stage": 1}), of({**ZERO2, "stage": 0}), of(bf16={"enabled": "auto"}, **OFF),
        of({**ZERO3, "offload_optimizer": CPU, "offload_param": CPU}), of({**ZERO2, "offload_optimizer": None}),
        of(dict.fromkeys(ZERO2, "auto") | {"stage": 2}), {"zero_optimization": {"stage": 2}},
        *[json.loads(path.read_text()) for path in sorted(DS_CONFIGS.glob("*.json"))],
    ],
    ids=str,
)  # fmt: skip
def test_what_pages_have_is_done(content: dict[str, Any], tmp_path: Path) -> None:
    environment = environment_of(tmp_path, content)
    check_asked_for(environment)
    settings = settings_asked_for(environment)
    assert without_auto(settings) and not settings.keys() & REFUSED.keys() and not not_used(environment)
    deepspeed.runtime.config.get_zero_config(settings)  # does not raise
    done = filled(settings, TrainConfig(batch_size=24, micro_batch_size=4, max_grad_norm=0.7), 2, 3, "fp32")
    assert [done[name] for name in SIZES] == [24, 4, 3, 0.7]
    stage = settings["zero_optimization"]["stage"]
    assert engine_asked_for(environment) == (f"zero{stage}" if stage else "single")
    if settings["zero_optimization"].get("offload_optimizer"):  # the recipe's own optimizer steps there, too
        assert settings["zero_force_ds_cpu_optimizer"] is False


REFUSALS: list[tuple[Any, str]] = [
    (of(optimizer={"type": "AdamW", "params": {"lr": "auto"}}), "optimizer: must be left out; the recipe makes"),
    (of(scheduler={"type": "WarmupDecayLR", "params": {}}), "scheduler: must be left out"),
    (of(gradient_cliping=1.0), "gradient_cliping is none of DeepSpeed's settings: did you mean gradient_clipping"),
    (of({**ZERO2, "overlap_com": True}), "zero_optimization.overlap_com is none of DeepSpeed's settings: did you mean"),
    (of(bf16={"enabled": "auto", "loss_scale": 0}), "bf16.loss_scale is none of DeepSpeed's settings"),
    (of({**ZERO2, "reduce_bucket_size": "5e8"}), 'reduce_bucket_size "5e8": must be an integer from 0'),
    (of({**ZERO2, "overlap_comm": "yes"}), 'zero_optimization.overlap_comm "yes": must be true or false'),
    (of({"stage": 4}), "zero_optimization.stage 4: must be 0, 1, 2 or 3"),
    (of({"stage": "2"}), 'zero_optimization.stage "2": must be 0, 1, 2 or 3'),
    (of({"overlap_comm": True}), "zero_optimization.stage is missing"),
    ({"train_batch_size": "auto"}, "zero_optimization.stage is missing"),
    ({"zero_optimization": True}, "zero_optimization true: must be a section in braces"),
    (of({**ZERO3, "offload_param": {"device": "nvme"}}), 'offload_param.device "nvme": must be "none" or "cpu"'),
    (of({**ZERO2, "offload_param": CPU}), "zero_optimization.offload_param with stage 2: it needs stage 3"),
    (of({**ZERO2, "stage": 0, "offload_optimizer": CPU}), "zero_optimization.offload_optimizer with stage 0"),
    (of({**ZERO2, "cpu_offload": True}), 'in place of it write "offload_optimizer": {"device": "cpu"}'),
    (of({**ZERO2, "offload_optimizer": CPU}, zero_force_ds_cpu_optimizer=True), "zero_force_ds_cpu_optimizer true"),
    (of({**ZERO3, "zero_hpz_partition_size": 8}), "zero_hpz_partition_size 8: must be left out"),
    (of({**ZERO3, "zero_quantized_weights": True}), "zero_quantized_weights true: must be left out"),
    (of({**ZERO3, "mics_shard_size": 8}), "mics_shard_size 8: must be left out; DeepSpeed has removed it"),
    (of(activation_checkpointing={"cpu_checkpointing": True}), "give the recipe --gradient-checkpointing"),
    (of(wandb={"enabled": True, "project": "p"}), "wandb: must be left out; it would log a scaled loss"),
    (of(curriculum_learning={"enabled": True}), "curriculum_learning: must be left out"),
    (of(tensor_parallel={"autotp_size": 2}), "tensor_parallel: must be left out; processes share out rows"),
    (of(gradient_allreduce_op="sum"), 'gradient_allreduce_op "sum": must be "mean"'),
    (of(prescale_gradients=True), "prescale_gradients or gradient_predivide_factor under ZeRO"),
    (of(bf16={"enabled": True}, fp16={"enabled": True}), "enables bf16 and fp16"),
    (of(bfloat16={"enabled": True}), 'bfloat16: must be left out; in place of it write "bf16"'),
    ('{"zero_optimization": {"stage": 2, "stage": 3}}', "ds.json: stage stands there twice"),
    ("[]", "no DeepSpeed configuration"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "says"), REFUSALS, ids=[says for _, says in REFUSALS])
def test_what_a_recipe_does_not_do_is_refused(content: Any, says: str, tmp_path: Path) -> None:
    environment = environment_of(tmp_path, content)
    assert says in refusal(check_asked_for, environment) == refusal(Cluster.here, environment)  # a dry run as the run


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (of(gradient_clipping=0.5), "gradient_clipping=0.5, the recipe's settings give 1.0"),
        (of(gradient_accumulation_steps=4), "gradient_accumulation_steps=4, the recipe's settings give 1"),
        (of(train_micro_batch_size_per_gpu=2), "train_micro_batch_size_per_gpu=2, the recipe's settings give 4"),
        (of(train_batch_size=16), "train_batch_size=16, the recipe's settings give 8"),
        (of(bf16={"enabled": True}), "bf16.enabled=true, the recipe's settings give false"),
        (of({**ZERO2, "compute_grad_norm": False}), "compute_grad_norm false with max_grad_norm 1.0"),
    ],
)
def test_values_that_are_not_the_recipes(content: dict[str, Any], says: str, tmp_path: Path) -> None:
    settings = settings_asked_for(environment_of(tmp_path, content))
    assert says in refusal(filled, settings, TrainConfig(batch_size=8, micro_batch_size=4), 2, 1, "fp32")


def test_a_batch_size_that_processes_do_not_divide_is_the_recipes_all_the_same(tmp_path: Path) -> None:
    settings = settings_asked_for(environment_of(tmp_path, of(train_batch_size=10)))
    done = filled(settings, TrainConfig(batch_size=10, micro_batch_size=5), 4, 1)
    assert done["train_batch_size"] == 12 == 4 * done["train_micro_batch_size_per_gpu"]


def test_stage_0_computes_in_fp32(tmp_path: Path) -> None:
    settings = settings_asked_for(environment_of(tmp_path, of({"stage": 0})))
    assert filled(settings, TrainConfig(), 1, 1, "fp32")["zero_optimization"]["stage"] == 0
    assert "stage 0 with precision bf16" in refusal(filled, settings, TrainConfig(), 1, 1, "bf16")


def test_its_precision_is_that_of_a_run_which_says_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, own in (("bf16", {"bf16": {"enabled": True}}), ("fp32", {"bf16": {"enabled": False}}), ("", {})):
        environment = environment_of(tmp_path, of(**own))
        assert precision_asked_for(environment) == asked
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert with_precision(RunConfig()).train.precision == (asked or "fp32")
        for launcher in ("bf16", "fp16"):
            environment["ACCELERATE_MIXED_PRECISION"] = launcher
            if asked in ("", launcher):
                assert precision_asked_for(environment) == launcher
            else:
                assert f"mixed_precision {launcher} of the launcher, and {asked}" in refusal(
                    check_asked_for, environment
                )


def test_sizes_of_a_model_of_several_parts_are_those_of_its_texts() -> None:
    for architecture, sizes in (
        (
            Gemma3Config(text_config={"hidden_size": 100, "num_attention_heads": 4}),
            {"reduce_bucket_size": 10_000, **OF_STAGE_3},
        ),
        (LlamaConfig(), {name: ZERO3[name] for name in ("reduce_bucket_size", *OF_STAGE_3)}),  # accelerate fills them
        (None, {}),
    ):
        zero = dict(ZERO3)
        fill_sizes(zero, architecture)
        assert {name: zero[name] for name in ("reduce_bucket_size", *OF_STAGE_3) if name in zero} == sizes


def test_what_is_done_in_another_way_is_said(tmp_path: Path) -> None:
    content = of(steps_per_print=10, checkpoint={"tag_validation": "Fail"})
    environment = environment_of(tmp_path, content)
    lines = not_used(environment)
    assert [line.split()[3] for line in lines] == ["steps_per_print", "checkpoint"]
    assert not settings_asked_for(environment).keys() & {"steps_per_print", "checkpoint"}


def test_accelerates_own_section() -> None:
    own = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_CLIPPING": "1.0"}
    asked = settings_asked_for(own | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"})
    assert (asked["zero_optimization"]["stage"], asked["gradient_clipping"]) == (2, 1.0)
    assert asked["zero_force_ds_cpu_optimizer"] is False and "gradient_accumulation_steps" not in asked
    nvme = own | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert 'offload_param.device "nvme": must be' in refusal(check_asked_for, nvme)


def test_accelerates_section_besides_a_file(tmp_path: Path) -> None:
    environment = environment_of(tmp_path, of(), ACCELERATE_CONFIG_DS_FIELDS="deepspeed_config_file,mixed_precision")
    check_asked_for(environment)
    environment["ACCELERATE_CONFIG_DS_FIELDS"] = "deepspeed_config_file,gradient_clipping"
    assert "has gradient_clipping besides deepspeed_config_file" in refusal(check_asked_for, environment)


def test_the_tables_know_all_that_deepspeed_knows() -> None:
    """Of each section, all of its names, and no other: one that DeepSpeed adds or drops is a line in the tables."""
    from deepspeed.runtime import config, precision_config
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero import offload_config as offload

    models = {
        "zero_optimization": zero.DeepSpeedZeroConfig, "fp16": precision_config.DeepSpeedFP16Config,
        "zero_optimization.offload_optimizer": offload.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": offload.DeepSpeedZeroOffloadParamConfig,
        "bf16": precision_config.DeepSpeedBF16Config, "comms_logger": deepspeed.comm.config.CommsLoggerConfig,
    }  # fmt: skip
    for section, model in models.items():
        theirs = {field.alias or name for name, field in model.model_fields.items()}
        ours = {name for names in KEYS[section].values() for name in names.split()}
        places = {place.removeprefix(f"{section}.") for place in REFUSED if place.startswith(f"{section}.")}
        assert ours <= theirs <= ours | places, section
    assert REFUSED.keys() >= config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()
    assert REFUSED.keys() >= {f"zero_optimization.{name}" for name in config._REMOVED_ZERO_CONFIG_KEYS}


# --------------------------------------------------------------------------------------------------- real processes


def test_losses_and_ranks_are_those_of_one_process(tmp_path: Path) -> None:
    """Offload, sections that are off, "auto" wherever it may stand: each ended with a traceback before."""
    project, few = Project(tmp_path), ("--max-steps", "8")
    content = of({**dict.fromkeys(ZERO2, "auto"), "stage": 2, "offload_optimizer": CPU}, steps_per_print=5, **OFF)
    runs = []
    for name, world_size, environment in (("one", 1, {}), ("two", 2, environment_of(tmp_path, content))):
        code, said, errors = run_recipe(
            "llama_commonsense", world_size, project.arguments(tmp_path / name, *few), environment
        )
        assert code == 0, errors[-3000:]
        assert ("steps_per_print is not used" in said) == (name == "two")
        runs.append(Run(tmp_path / name))
    torch.testing.assert_close(runs[1].losses, runs[0].losses, rtol=1e-5, atol=1e-5)
    assert runs[1].pattern == runs[0].pattern and runs[1].facts["engine"] == "zero2"


def test_a_dry_run_refuses_values_that_are_not_the_recipes(tmp_path: Path) -> None:
    environment = environment_of(tmp_path, of(train_batch_size=16))
    code, _, errors = run_recipe("llama_commonsense", 1, ["--dry-run", "--batch-size", "8"], environment)
    assert code == 2 and "train_batch_size=16, the recipe's settings give 8" in errors.splitlines()[-1]


def trained_with(rank: int, world_size: int, content: dict[str, Any], folder: str) -> dict[str, Any]:
    deepspeed.init_distributed("gloo")
    args = arguments(folder, world_size, "ddp", deepspeed=content)
    callback = AdaLoraCallback(SETTINGS)
    trainer = trainer_of(model_with_adapters(), args, callback)
    try:
        trainer.train()
    except ValueError as error:
        return {"error": str(error)}
    return {"rank": sum(callback.hooks.rank_pattern().values())}


def own_loop(rank: int, world_size: int, zero: dict[str, Any]) -> str:
    model = model_with_adapters()
    optimizer = torch.optim.AdamW(parameter_groups(model, SETTINGS, learning_rate=1e-3))
    attach(model, optimizer, SETTINGS, total_steps=20)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    ids = torch.arange(3, 11).view(1, 8)
    try:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    except ValueError as error:
        return str(error)
    return ""


def test_an_own_loop_is_refused_in_its_first_step() -> None:
    [said, same] = run_ranks(2, own_loop, {"stage": 3, "zero_hpz_partition_size": 2})
    assert said == same and said.startswith("zero_hpz_partition_size keeps a second copy of the weights")
    assert run_ranks(2, own_loop, {"stage": 3}) == ["", ""]


ADAMW = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (of(optimizer={"type": "AdamW", "params": ADAMW}), "optimizer AdamW: DeepSpeed's own"),
        (of(optimizer={"type": "OneBitAdam", "params": ADAMW}), "optimizer OneBitAdam: DeepSpeed's own"),
        (of({**ZERO2, "offload_optimizer": CPU}), 'write "zero_force_ds_cpu_optimizer": false'),
        (of({**ZERO3, "zero_hpz_partition_size": 2}), "zero_hpz_partition_size 2: must be left out"),
    ],
)
def test_trainer_is_refused_before_its_engine_is_built(content: dict[str, Any], says: str, tmp_path: Path) -> None:
    [result] = run_ranks(1, trained_with, content, str(tmp_path))
    assert says in result["error"] and "\n" not in result["error"]


def test_trainer_with_an_optimizer_of_torch_in_the_file(tmp_path: Path) -> None:
    params = ADAMW | {"torch_adam": True}
    [result] = run_ranks(1, trained_with, of(optimizer={"type": "AdamW", "params": params}), str(tmp_path))
    assert result == {"rank": 21}


@pytest.mark.parametrize("content", [of(), of(ZERO3), of({**ZERO2, "offload_optimizer": CPU}, tensor_parallel={})])
def test_what_any_loop_may_ask_for(content: dict[str, Any]) -> None:
    check_in_any_loop(content)


@pytest.mark.parametrize("zero", [{"zero_hpz_partition_size": 2}, {"offload_optimizer": {"device": "nvme"}}])
def test_what_no_loop_may_ask_for(zero: dict[str, Any]) -> None:
    with refused("must be left out"):
        check_in_any_loop(of({**ZERO3, **zero}))
