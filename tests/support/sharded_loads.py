"""A backbone that no process holds, loaded and trained on real ranks: what each of them held and saw."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from adalora_dist.backbones.load import load_backbone
from adalora_dist.config.methods import AdaLoraConfig
from adalora_dist.config.sections import ModelConfig, RunConfig, TrainConfig
from adalora_dist.methods.inject import adapt
from adalora_dist.sharding.tensors import full_numel, local_part
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.tasks.losses import causal_loss
from adalora_dist.training.engine import build_accelerator
from adalora_dist.training.loop import train
from adalora_dist.training.prepared import prepare
from adalora_dist.training.run_folder import RunFolder
from tests.support.memory import peak_bytes
from tests.support.paths import DS_CONFIGS

ENVIRONMENT = {
    "single": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    },
    "fsdp2 whole": {},
    "fsdp2 ram-efficient": {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(DS_CONFIGS / "zero3.json"),
    },
}  # fmt: skip
STEPS, GLOBAL_BATCH, VOCABULARY = 14, 6, 259
ADAPTER = AdaLoraConfig(
    init_rank=3, target_rank=1.5, alpha=6, start="paper", init="orthonormal", initial_warmup_steps=2, final_steps=4,
    mask_interval_steps=2,
)  # fmt: skip


def start(engine: str, train_config: TrainConfig) -> Any:
    """The accelerator as ``accelerate launch`` would have it."""
    values = ENVIRONMENT[engine.partition(" ")[0]] | ENVIRONMENT[engine]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        return build_accelerator(train_config)


def rows() -> list[dict[str, list[int]]]:
    sequences = [[3 + (k + 7 * i * (1 + k % 3)) % 250 for i in range(5 + k % 4)] for k in range(3 * GLOBAL_BATCH)]
    return [{"input_ids": ids, "labels": ids} for ids in sequences]


def run(
    rank: int, world_size: int, engine: str, folder: Path, output: Path, auto_class: type, **changes: Any
) -> dict[str, Any]:
    """Load, inject, prepare, one forward, a short training run; what this rank held and saw."""
    settings = TrainConfig(
        output_dir=str(output), max_steps=STEPS, batch_size=GLOBAL_BATCH, micro_batch_size=GLOBAL_BATCH,
        learning_rate=2e-2, lr_warmup_ratio=0, overwrite=True,
    )  # fmt: skip
    config = RunConfig(model=ModelConfig(name=str(folder)), adapter=ADAPTER.model_copy(update=changes), train=settings)
    accelerator = start(engine, settings)
    torch.manual_seed(5)

    def load() -> tuple[Any, int, Any]:
        if engine == "fsdp2 whole":  # loaded in full, to be sharded after that
            model = auto_class.from_pretrained(folder)
        else:
            model, _ = load_backbone(config.model, auto_class)
        loaded_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)
        adapt(model, config.adapter, seed=1)
        return model, loaded_bytes, prepare(accelerator, model, config, STEPS)

    loaded: list[tuple[Any, int, Any]] = []
    peak = peak_bytes(lambda: loaded.append(load()), folder.glob("*.safetensors"))
    [(model, loaded_bytes, prepared)] = loaded
    frozen = [p for p in prepared.model.parameters() if not p.requires_grad]
    if engine.startswith("fsdp2"):
        assert all(isinstance(p, DTensor) and not p.is_meta for p in frozen)
        held = [p.to_local() for p in frozen]
    else:
        held = [p.ds_tensor for p in frozen] if engine == "zero3" else frozen
    sequence = torch.arange(3, 3 + 11).unsqueeze(0)
    unwrapped = accelerator.unwrap_model(prepared.model)
    unwrapped.eval()
    with torch.no_grad():
        logits = unwrapped(input_ids=sequence).logits
    result = {
        "logits": logits.float(),
        "dtype": str(logits.dtype),
        "training": model.training,
        "loaded_bytes": loaded_bytes,
        "held_bytes": sum(t.numel() * t.element_size() for t in held),
        "peak_bytes": peak,
        "trained_bytes": sum(local_part(p).numel() * 4 for p in prepared.model.parameters() if p.requires_grad),
        "largest_bytes": max(full_numel(p) * p.element_size() for p in frozen),
        "row_bytes": sum(p.shape[1:].numel() * p.element_size() for p in frozen),
        "num_frozen": len(frozen),
    }
    if auto_class is AutoModelForCausalLM:
        plan = BatchPlan.of_rows(rows(), GLOBAL_BATCH, seed=3)
        report, loss_sum = RunFolder(config, rank == 0, {}), causal_loss(rows(), 0, accelerator.device)
        result["losses"] = train(accelerator, prepared, plan, loss_sum, config, report, lambda _: None)
        result["patterns"] = {a.step: a.keep.tolist() for a in prepared.hooks.method_step.allocations}
    return result


def run_with(
    rank: int, world_size: int, engine: str, folder: Path, auto_class: type, changes: dict[str, Any]
) -> dict[str, Any]:
    return run(rank, world_size, engine, folder, folder / engine / str(world_size), auto_class, **changes)


def anonymous_bytes() -> int:
    """Memory of this process that is not a mapped file's, which the kernel can drop and read again."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])


def peak_of_loading(rank: int, world_size: int, engine: str, folder: Path) -> int:
    """Largest growth of this rank's memory, in bytes, until the backbone is loaded and, under FSDP2, sharded."""
    settings = TrainConfig(output_dir=str(folder / "run"), max_steps=STEPS)
    config = RunConfig(model=ModelConfig(name=str(folder)), adapter=ADAPTER, train=settings)
    accelerator = start(engine, settings)
    # M_MMAP_THRESHOLD: freed tensors go back to the system at once, as large ones always do.
    assert ctypes.CDLL(None).mallopt(-3, 1 << 14) == 1
    peak, before, done = 0, anonymous_bytes(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes() - before)
            done.wait(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    model, _ = load_backbone(config.model, AutoModelForCausalLM)
    if engine == "zero3":
        assert all(p.numel() == 0 for p in model.parameters())
    else:
        adapt(model, config.adapter)
        model = prepare(accelerator, model, config, STEPS).model
    done.set()
    thread.join()
    assert model is not None
    return peak
