"""``adalora-dist plan`` against what runs do: the allocator's peak, the bytes of collectives; what it says."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from adalora_dist.__main__ import main
from adalora_dist.config.methods import method_config
from adalora_dist.config.sections import RunConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods import method_for
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.protocol import adapters_of
from adalora_dist.training.plan.cluster import Cluster
from adalora_dist.training.plan.live import LiveBytes
from adalora_dist.training.plan.plan import Plan, Planner
from adalora_dist.training.plan.text import cluster_text, own_text
from adalora_dist.training.start import Placement, environments_of
from tests.support.planned_runs import LENGTH, STEPS, architecture, configuration, counted, sent
from tests.support.ranks import run_ranks
from tests.support.recipe_runs import ENGINES


def planner(layers: int = 3, **train: Any) -> Planner:
    config = configuration(**train)
    model = adapted(config, layers)
    schedule = method_for(config.adapter).step(adapters_of(model), STEPS).schedule
    return Planner(config, AutoModelForCausalLM, architecture(layers), model, schedule)


def adapted(config: RunConfig, layers: int) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(architecture(layers))
    adapt(model, config.adapter, 0)
    return model


def planned(engine: str, world_size: int) -> Plan:
    return planner().plan(Cluster.parse(f"{world_size}x80GB", engine=engine))


@pytest.mark.parametrize(
    ("engine", "world_size"),
    [
        ("single", 1),
        *(pytest.param(engine, 2, marks=pytest.mark.slow) for engine in ("ddp", "fsdp2", "zero2", "zero3")),
        pytest.param("hsdp", 4, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(1800)  # a busy machine is slow, and no other measure of memory
def test_a_plan_is_what_a_run_does(engine: str, world_size: int) -> None:
    """The peak of a process within 10 %, before and after the freeze; the method's bytes on the wire exactly."""
    plan = planned(engine, world_size)
    runs = [run_ranks(world_size, counted, engine, configuration(), timeout=500)[0] for _ in range(3)]
    # What threads let go of late, or the profiler misses the end of, only adds to a peak.
    before, after, (_, _, summed, allocated) = min(r[0] for r in runs), min(r[1] for r in runs), runs[0]
    assert plan.before.peak == pytest.approx(before, rel=0.1)
    assert plan.after.peak == pytest.approx(after, rel=0.1)
    assert plan.after.kept < plan.before.kept
    traffic = plan.traffic
    assert traffic.per_allocation == allocated
    if engine == "zero2":  # rows that are cut are told as "at most"
        assert 0 < summed <= traffic.of_method_per_step
    else:
        assert traffic.of_method_per_step == summed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "precision", "slack"),
    [("ddp", "fp32", 512), ("fsdp2", "fp32", 0), ("zero1", "fp32", 16), ("zero2", "fp32", 16), ("zero3", "fp32", 0.01),
     ("hsdp", "fp32", 0), ("fsdp2", "bf16", 0), ("hsdp", "bf16", 0), ("zero2", "bf16", 16)],
)  # fmt: skip
def test_what_an_engine_sends_is_counted(engine: str, precision: str, slack: float) -> None:
    """Two micro-steps on two processes, with HSDP on four. Besides: DDP's buffers, DeepSpeed's norms; stage 3 gathers a
    little more."""
    world_size = 4 if engine == "hsdp" else 2
    train = {"micro_batch_size": 4 // world_size, "precision": precision}
    plan = planner(**train).plan(Cluster.parse(f"{world_size}x80GB", engine=engine))
    assert plan.micro_steps == 2
    found = {*run_ranks(world_size, sent, engine, configuration(**train), timeout=500.0)}
    assert len(found) == 1
    room = {"rel": slack} if slack < 1 else {"abs": slack, "rel": 0}
    assert plan.traffic.per_step == pytest.approx(found.pop(), **room)


def test_many_layers_are_a_straight_line() -> None:
    """Two depths continued to nine layers, against nine layers."""
    from adalora_dist.training.plan import fake

    config, settings = configuration(), architecture(9)
    line = fake.step_bytes(config, AutoModelForCausalLM, settings, torch.float32, 8)
    whole = fake._measured(config, AutoModelForCausalLM, settings, torch.float32, 8)
    assert line.num_parameters == whole.num_parameters and line.weights == pytest.approx(whole.weights, rel=1e-6)
    assert line.activations == pytest.approx(whole.activations, rel=0.02)


def test_methods_that_draw_seeds_or_check_values_are_planned() -> None:
    """Their adapters are made on fake tensors, too. GaLore's spans are values, and it is refused by its name."""
    from adalora_dist.training.plan import fake

    settings = architecture(2)
    for method in ("lora_fa", "dylora", "relora", "houlsby"):
        config = configuration().model_copy(update={"adapter": method_config(method)})
        found = fake.step_bytes(config, AutoModelForCausalLM, settings, torch.float32, 2)
        assert found.weights > 0 and found.activations > 0
    config = configuration().model_copy(update={"adapter": method_config("galore")})
    with pytest.raises(UserError, match="a step of Llama.* with method galore cannot be made"):
        fake.step_bytes(config, AutoModelForCausalLM, settings, torch.float32, 2)


def test_what_is_alive_is_counted() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(1000)
        view = kept.view(10, 100)[2:]
        gone = kept + 1
        assert live.now == live.peak == 8000
        del gone, kept
        assert live.now == 4000 and live.peak == 8000  # the view holds it
        live.restart()
        assert live.peak == 4000
        del view
        assert live.now == 0


def test_clusters() -> None:
    assert vars(Cluster.parse("8x80GB", 2)) | {"engine": "fsdp2"} == vars(Cluster.parse("8X80", 2, "fsdp2"))
    assert Cluster.parse("24GB").engine == "single" and Cluster.parse("24GB").world_size == 1
    in_bytes = [("8x80GiB", 85.89934592), ("1x81559MiB", 85.520809984), ("2 * 0.08 TB", 80), ("8×80", 80), ("40g", 40)]
    assert [Cluster.parse(gpus).gigabytes for gpus, _ in in_bytes] == pytest.approx([size for _, size in in_bytes])
    for gpus, nodes, engine, says in (
        ("eight", 1, None, "--gpus"), ("0x80GB", 1, None, "--gpus"), ("8", 1, None, "--gpus '8': must be NUMBERxMEM"),
        ("8xH100", 1, None, "--gpus"), ("8x80KB", 1, None, "--gpus"), ("8x80TB", 1, None, "--gpus"),
        ("8x80GB", 0, None, "--nodes"),
        ("8x80GB", 1, "single", "--engine single with 8 GPUs"), ("8x80GB", 1, "fsdp1", "--engine fsdp1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            Cluster.parse(gpus, nodes, engine)


@pytest.mark.parametrize("words", ["--tflops 0", "--link 0", "--link nan", "--nodes some", "--engine fsdp1", "--gpus"])
def test_a_typing_error_is_one_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = words.split()
    for line in ([*flags, "llama_sft"], ["llama_sft", *flags]):
        with pytest.raises(SystemExit) as stopped:
            main(["plan", *line])
        said = capsys.readouterr()
        assert (stopped.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert flags[0] in said.err


def test_what_does_not_fit_is_helped() -> None:
    """The change that is told of is one after which it fits, and a smaller one would not do."""
    plans = planner()
    peak = plans.plan(Cluster.parse("80GB")).peak
    tight = Cluster.parse(f"{0.8 * peak / 0.92 / 1e9:.6f}GB")
    said = cluster_text(plans, tight, STEPS)
    assert "the smallest change that fits: --micro-batch-size 4" in said and "80 GB yes" in said
    assert "nothing that is tried" in cluster_text(plans, Cluster.parse("0.001GB"), STEPS)
    words = [words for words, _ in plans.changes(Cluster.parse("0.001GB"))]
    assert words[-1].endswith("--gradient-checkpointing --quantization nf4 --engine fsdp2 --nodes 8")


def test_micro_batches_by_tokens_are_planned_as_rows() -> None:
    by_tokens, by_rows = planner(micro_batch_tokens=4 * LENGTH + 1), planner(micro_batch_size=4)
    cluster = Cluster.parse("0.001GB")
    assert by_tokens.plan(cluster) == by_rows.plan(cluster) and by_rows.plan(cluster).micro_batch == 4
    words = [words for words, _ in by_tokens.changes(cluster)]
    assert words[:2] == [f"--micro-batch-tokens {2 * LENGTH}", f"--micro-batch-tokens {LENGTH}"]
    assert words[2] == f"--micro-batch-tokens {LENGTH} --gradient-checkpointing"


def test_copies_are_planned() -> None:
    """HSDP: memory is that of the processes of one copy, and gradients of what is trained are sent once more."""
    plans = planner()
    copies, sharded = (plans.plan(Cluster.parse("4x80GB", engine=engine)) for engine in ("hsdp", "fsdp2"))
    over_two = plans.plan(Cluster.parse("2x80GB"))
    assert copies.before.weights == over_two.before.weights > 1.9 * sharded.before.weights
    assert copies.traffic.per_step > over_two.traffic.per_step
    assert cluster_text(plans, copies.cluster, STEPS).startswith("Plan       hsdp (2 copies) on 4 x 80 GB")
    tight = [words for words, _ in plans.changes(Cluster.parse("8x0.001GB", engine="hsdp"))]
    assert tight[1].endswith("--gradient-checkpointing --engine fsdp2")
    of_machines = Cluster.parse("8x80GB", 4, "hsdp")
    assert (of_machines.copies, of_machines.num_shards) == (4, 8)
    assert of_machines.link_rate > Cluster.parse("8x80GB", 4, "fsdp2").link_rate


def test_int8_is_planned_where_it_runs() -> None:
    plans = planner()
    int8 = plans.config.quantization.model_copy(update={"quantization": "int8"})
    plans.config = plans.config.model_copy(update={"quantization": int8})
    with pytest.raises(UserError, match="quantization=int8 with fsdp2"):
        plans.plan(Cluster.parse("2x80GB"))
    assert all("fsdp2" not in words for words, _ in plans.changes(Cluster.parse("2x80GB", engine="ddp")))


def test_float8_is_planned_as_a_byte_per_weight() -> None:
    held = {}
    for method in ("none", "nf4", "fp8"):
        plans = planner()
        quantization = plans.config.quantization.model_copy(update={"quantization": method})
        plans.config = plans.config.model_copy(update={"quantization": quantization})
        held[method] = plans.plan(Cluster.parse("2x80GB")).before.quantized
    assert held["none"] == 0 and held["fp8"] == pytest.approx(held["nf4"] * 8 / 4.127, rel=1e-4)


def test_a_dry_run_plans_what_its_launcher_has_asked_for() -> None:
    """From the variables that launchers set, those of ``adalora-dist run`` included; what cannot be made is a line."""
    asked: dict[tuple[str, int], dict[str, str]] = {("single", 1): {}}
    asked |= {(engine, 2): {**ENGINES[engine], "WORLD_SIZE": "2"} for engine in ENGINES}
    for engine in ("single", "ddp", "fsdp2", "zero2", "zero3"):
        count = 1 if engine == "single" else 8
        asked[engine, count] = environments_of(Placement(engine, count), {})[0]
    for (engine, world_size), environment in asked.items():
        found = Cluster.here(environment)
        assert (found.engine, found.world_size, found.nodes) == (engine, world_size, 1)
    copies = Cluster.here(environments_of(Placement("hsdp", 8, 2, 1, "host"), {})[0])
    assert (copies.engine, copies.nodes, copies.copies, copies.num_shards) == ("fsdp2", 2, 2, 8)
    two_nodes = environments_of(Placement("fsdp2", 8, 2, 1, "host"), {})[0]
    assert (Cluster.here(two_nodes).nodes, Cluster.here(two_nodes).gpus_per_node) == (2, 8)
    assert Cluster.here({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}).engine == "single"

    plans = planner(layers=1)
    said = own_text(plans, Cluster.here(asked["zero3", 2]))
    assert said.startswith("Memory     of one of 2 processes under zero3: 4 sequences each in 1 micro-step(s)")
    assert "before the freeze" in said and "\npeak " in said and "\nFits       24 GB yes, 48 GB yes, 80 GB yes" in said
    galore = plans.config.model_copy(update={"adapter": method_config("galore")})
    said = own_text(Planner(galore, AutoModelForCausalLM, architecture(1), adapted(galore, 1), None), Cluster.here({}))
    assert said.startswith("Memory     not planned: a step of LlamaConfig with method galore") and "\n" not in said


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["adalora-dist"])
    flags = ["--gpus", "2x24GB", "--engine", "zero3", "--max-steps", "100", "--batch-size", "4"]
    main(["plan", "llama_commonsense", *flags])
    said = capsys.readouterr().out
    for words in ("Steps      100", "zero3 on 2 x 24 GB", "peak", "before the freeze", "Wire", "Disk", "Time", "Fits"):
        assert words in said
    with pytest.raises(SystemExit):
        main(["plan", "llama_commonsense", "--gpus", "many"])
    assert capsys.readouterr().err.startswith("error: --gpus 'many'")
