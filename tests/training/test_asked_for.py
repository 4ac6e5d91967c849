"""What a launcher asks for in the environment: done, or refused in one line, never passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from adalora_dist.config.sections import RunConfig
from adalora_dist.training.asked_for import PARALLELISM, check_asked_for, copies_asked_for, precision_asked_for
from adalora_dist.training.engine import with_precision
from adalora_dist.training.plan.cluster import Cluster
from adalora_dist.training.start import Placement, environments_of
from tests.support.recipe_runs import run_command
from tests.support.refusals import refusal
from tests.support.tiny_project import RECIPE, Project


def of_hsdp() -> dict[str, str]:
    return environments_of(Placement("hsdp", 4), {})[0]


def test_what_files_have_by_default_is_asked_for() -> None:
    for engine in ("ddp", "fsdp2", "hsdp"):
        own = environments_of(Placement(engine, 4), {})[0]
        check_asked_for(own | {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"})
    assert copies_asked_for(of_hsdp()) == 2


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({f"{PARALLELISM}TP_SIZE": "2"}, "parallelism_config_tp_size 2: must be 1"),
        ({f"{PARALLELISM}CP_SIZE": "2"}, "parallelism_config_cp_size 2: must be 1"),
        ({f"{PARALLELISM}SP_SIZE": "4"}, "parallelism_config_sp_size 4: must be 1"),
        ({f"{PARALLELISM}DP_SHARD_SIZE": "3"}, "must multiply to the 4 process(es)"),
        ({f"{PARALLELISM}DP_REPLICATE_SIZE": "1"}, "dp_replicate_size 1, parallelism_config_dp_shard_size 2: must"),
        (
            {f"{PARALLELISM}DP_REPLICATE_SIZE": "4", f"{PARALLELISM}DP_SHARD_SIZE": "1"},
            "parallelism_config_dp_replicate_size 4 without shards",
        ),
        ({"ACCELERATE_USE_FSDP": "false"}, "without shards"),
        ({"FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "set it to TRANSFORMER_BASED_WRAP"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend inductor of the launcher"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision fp8 of the launcher: must be no, bf16 or fp16"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM of the launcher"),
    ],
)
def test_what_a_recipe_does_not_do_is_refused(asked: dict[str, str], says: str) -> None:
    own = of_hsdp() | asked
    assert says in refusal(check_asked_for, own) == refusal(Cluster.here, own)  # a dry run as the run


def test_the_launchers_precision_is_that_of_a_run_which_says_none(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig()
    for asked in ("bf16", "fp16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        assert precision_asked_for() == with_precision(config).train.precision == asked
        own = config.model_copy(update={"train": config.train.model_copy(update={"precision": "fp32"})})
        assert with_precision(own).train.precision == "fp32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert precision_asked_for() == "" and config.train.precision == "auto"


def test_a_precision_that_the_recipe_does_not_take_is_said(tmp_path: Path) -> None:
    arguments = [*Project(tmp_path).arguments(tmp_path / "run", "--max-steps", "2"), "--precision", "fp32"]
    done = run_command("accelerate", "launch", "--cpu", "--mixed_precision", "bf16", RECIPE, *arguments)
    assert done.returncode == 0, done.stderr
    assert "mixed_precision bf16 of the launcher is not used: precision is fp32" in done.stdout
