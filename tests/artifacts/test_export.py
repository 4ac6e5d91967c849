"""What a run leaves behind says what the trained model says, in plain transformers, whatever the engine was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adalora_dist.artifacts import export
from adalora_dist.artifacts.export import base_folder_of, load_adapter, merge, save_adapter
from adalora_dist.config.methods import AdaLoraConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.protocol import Adapter
from adalora_dist.methods.update import AdapterWeights
from tests.support.engine_steps import backward_and_step
from tests.support.models import adapted_net, config, global_batch
from tests.support.ranks import import_deepspeed, run_ranks

deepspeed = import_deepspeed()

IDS = torch.tensor([[1, 5, 9, 4, 30, 2]])
RANK = 4


def llama(tied: bool = False, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    values = dict(
        vocab_size=48, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=48, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    ).eval()


def save_whole(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def save_in_shards(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="6KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def save_without_head(model: Any, folder: Path) -> None:
    """As GPT-2 is on the Hub: names without the leading ``transformer.``"""
    model.transformer.save_pretrained(folder)


def with_adapters(model: torch.nn.Module, targets: tuple[str, ...] = ("all-linear",)) -> list[Adapter]:
    """Adapters with random lambda: every matrix has one masked triplet, the second matrix all of them."""
    matrices = adapt(model, AdaLoraConfig(init_rank=RANK, alpha=6, targets=targets, start="paper", init="orthonormal"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for index, matrix in enumerate(matrices):
            matrix.lam.copy_(0.5 + torch.rand(RANK, generator=generator))
            matrix.lam[index % RANK] = 0
        matrices[1].lam.zero_()
    return matrices


def weights_of(matrices: list[Adapter]) -> list[AdapterWeights]:
    adapters = []
    for name, layer in ((m.name, m) for m in matrices):
        lam = layer.lam.detach()
        kept = lam != 0
        p, q = layer.P.detach()[:, kept].contiguous(), layer.Qt.detach()[:, kept].T.contiguous()
        adapters.append(AdapterWeights(name, p, lam[kept], q, layer.scale, hasattr(layer.base, "nf")))
    return adapters


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


# ------------------------------------------------------------------------------------------------------ merged model


@pytest.mark.parametrize(
    ("build", "save"),
    [
        (llama, save_whole),
        (lambda: llama(tied=True), save_whole),
        (llama, save_in_shards),
        (gpt2, save_whole),
        (gpt2, save_in_shards),
        (gpt2, save_without_head),
    ],
    ids=["llama", "llama-tied", "llama-in-shards", "gpt2", "gpt2-in-shards", "gpt2-without-head"],
)
def test_merged_model_says_what_the_adapted_one_says(
    tmp_path: Path, build: Callable[[], Any], save: Callable[[Any, Path], None]
) -> None:
    model = build()
    save(model, tmp_path / "base")
    plain = logits(model)
    matrices = with_adapters(model)
    expected = logits(model)
    assert (expected - plain).abs().max() > 0.1  # the adapters matter

    merge(weights_of(matrices), tmp_path / "base", tmp_path / "merged", show_progress=False)

    merged, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (logits(merged) - expected).abs().max() < 1e-5
    before, after = all_tensors(tmp_path / "base"), all_tensors(tmp_path / "merged")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    adapted = {f"{m.name}.weight" for m in matrices if m.lam.any()}
    assert {key.removeprefix("transformer.") for key in changed} == {k.removeprefix("transformer.") for k in adapted}
    assert not (tmp_path / "merged.partial").exists()


def test_merging_a_part_of_the_matrices(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    matrices = with_adapters(model, ("q_proj", "down_proj"))
    assert len(matrices) == 4
    merge(weights_of(matrices), tmp_path / "base", tmp_path / "merged", show_progress=False)
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_the_merged_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    matrices = with_adapters(model)
    merge(weights_of(matrices), tmp_path / "base", tmp_path / "merged", dtype, show_progress=False)
    assert {tensor.dtype for tensor in all_tensors(tmp_path / "merged").values()} == {dtype}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == dtype
    exact = matrices[0].base.weight + weights_of(matrices)[0].delta()  # rounded once, from the float32 sum
    assert torch.equal(merged.get_submodule(matrices[0].name).weight, exact.to(dtype))


def test_a_bf16_base_stays_bf16_unless_asked(tmp_path: Path) -> None:
    llama().bfloat16().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    matrices = with_adapters(model)
    merge(weights_of(matrices), tmp_path / "base", tmp_path / "same", show_progress=False)
    merge(weights_of(matrices), tmp_path / "base", tmp_path / "wide", torch.float32, show_progress=False)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "same").dtype == torch.bfloat16
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert wide.dtype == torch.float32
    assert (logits(wide) - logits(model)).abs().max() < 1e-5


def test_modules_trained_in_full_replace_the_base_ones(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    matrices = with_adapters(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    trained = {"lm_head.weight": model.lm_head.weight.detach()}
    merge(weights_of(matrices), tmp_path / "base", tmp_path / "merged", trained=trained, show_progress=False)
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - logits(model)).abs().max() < 1e-5


def test_an_interrupted_merge_leaves_no_merged_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    save_in_shards(model, tmp_path / "base")
    adapters = weights_of(with_adapters(model))
    written = []

    def save_two_and_stop(tensors: dict[str, torch.Tensor], path: Path, **kwargs: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        save_file(tensors, path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(export, "save_file", save_two_and_stop)
        with pytest.raises(KeyboardInterrupt):
            merge(adapters, tmp_path / "base", tmp_path / "merged", show_progress=False)
    assert len(written) == 2 and not (tmp_path / "merged").exists()
    merge(adapters, tmp_path / "base", tmp_path / "merged", show_progress=False)  # what was left is in nobody's way
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - logits(model)).abs().max() < 1e-5
    assert {path.name for path in tmp_path.iterdir()} == {"base", "merged"}


# ----------------------------------------------------------------------------------------------------- adapter alone


@pytest.mark.parametrize("build", [llama, gpt2])
def test_saved_adapter_comes_back(tmp_path: Path, build: Callable[[], Any]) -> None:
    model = build()
    model.save_pretrained(tmp_path / "base")
    matrices = with_adapters(model)
    save_adapter(weights_of(matrices), tmp_path / "adapter", "some/model", "main")

    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = load_adapter(restored, tmp_path / "adapter")

    assert (logits(restored) - logits(model)).abs().max() < 1e-5  # sums over fewer triplets round differently
    assert [m.name for m in loaded] == [m.name for m in matrices]
    ranks = {m.name: int((m.lam != 0).sum()) for m in matrices}
    assert {m.name: m.rank for m in loaded} == ranks
    assert loaded[1].rank == 0
    assert [name for name, _ in loaded[1].named_parameters() if not name.startswith("base.")] == []
    description = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert description["rank_pattern"] == ranks
    assert (description["base_model"], description["base_revision"]) == ("some/model", "main")


def test_an_adapter_without_any_triplet(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    plain = logits(model)
    matrices = with_adapters(model)
    for matrix in matrices:
        matrix.lam.data.zero_()
    save_adapter(weights_of(matrices), tmp_path / "adapter", "", None)
    merge(weights_of(matrices), tmp_path / "base", tmp_path / "merged", show_progress=False)
    restored = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert {m.rank for m in load_adapter(restored, tmp_path / "adapter")} == {0}
    assert torch.equal(logits(restored), plain)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), plain)


# ------------------------------------------------------------------------------------------------- what is refused


def refusal(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        fn(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_merging_into_the_wrong_folder(tmp_path: Path) -> None:
    model = llama()
    adapters = weights_of(with_adapters(model))
    (tmp_path / "pickled").mkdir()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    llama(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    llama(hidden_size=24).save_pretrained(tmp_path / "wide")
    merged = tmp_path / "merged"
    assert "no .safetensors" in refusal(merge, adapters, tmp_path / "pickled", merged)
    assert "model.layers.1." in refusal(merge, adapters, tmp_path / "short", merged, show_progress=False)
    line = refusal(merge, adapters, tmp_path / "wide", merged, show_progress=False)
    assert "model.layers.0.self_attn.q_proj" in line and "(24, 24)" in line and "(16, 16)" in line
    assert not merged.exists()


def test_adapters_that_cannot_be_loaded(tmp_path: Path) -> None:
    model = llama()
    save_adapter(weights_of(with_adapters(model)), tmp_path / "good", "", None)

    def broken(name: str, change: Callable[[Path], None]) -> str:
        folder = tmp_path / name
        save_adapter(weights_of(with_adapters(llama())), folder, "", None)
        change(folder)
        return refusal(load_adapter, llama(), folder)

    def edit(**values: Any) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            file = folder / "adapter.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | values))

        return change

    assert "adapter.json" in refusal(load_adapter, llama(), tmp_path / "nowhere")
    assert "format 7" in broken("format", edit(format=7))
    assert "does not hold an adapter" in broken("json", lambda f: (f / "adapter.json").write_text("{"))
    assert "does not hold an adapter" in broken("none", lambda f: (f / "adapter.safetensors").unlink())
    assert "does not hold an adapter" in broken("cut", lambda f: (f / "adapter.safetensors").write_bytes(b"12345"))
    missing = broken("missing", lambda f: save_file({"x": torch.zeros(1)}, f / "adapter.safetensors"))
    assert "model.layers.0.self_attn.q_proj.P" in missing
    assert "not in this model" in refusal(load_adapter, gpt2(), tmp_path / "good")
    assert "24 x 24" in refusal(load_adapter, llama(hidden_size=24), tmp_path / "good")


def test_base_folder_of_a_hub_id_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert base_folder_of(str(tmp_path), None) == tmp_path
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refusal(base_folder_of, "nobody/no-such-model", None)
    assert line.startswith("model=nobody/no-such-model")


# ------------------------------------------------------------------------------------------- from a run, any engine

STEPS = 30
SETTINGS = config(target_rank=0.75, initial_warmup_steps=4, final_steps=10)  # 3 of 12 triplets on 4 matrices


def train_and_gather(rank: int, world_size: int, engine: str) -> tuple[list[AdapterWeights], dict[str, int], Any]:
    model: Any = adapted_net(SETTINGS)
    net = model
    if engine == "fsdp2":
        mesh = init_device_mesh("cpu", (world_size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    hooks = attach(model, optimizer, SETTINGS, STEPS)
    allocator = hooks.method_step
    if engine == "ddp":
        model = DistributedDataParallel(model)
    if engine == "zero3":
        settings = {
            "train_micro_batch_size_per_gpu": 24 // world_size,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for step in range(STEPS):
        x, y = (t.chunk(world_size)[rank] for t in global_batch(step, 24))
        loss = (model(x) - y).square().mean()
        backward_and_step(engine, model, optimizer, loss)
    hooks.finish()
    branch = None
    if engine == "single":
        up = net.blocks[0].up
        branch = (up(torch.eye(up.d_in)) - up.base(torch.eye(up.d_in))).detach().T
    return hooks.updates(), allocator.rank_pattern(), branch


@pytest.fixture(scope="module")
def one_process() -> tuple[list[AdapterWeights], dict[str, int], Any]:
    return run_ranks(1, train_and_gather, "single")[0]


def test_gathered_adapters_are_the_active_triplets(one_process: Any) -> None:
    adapters, pattern, branch = one_process
    assert {a.name: a.lam.numel() for a in adapters} == pattern
    assert sum(pattern.values()) == 3 and 0 in pattern.values()
    for adapter in adapters:
        rank = adapter.lam.numel()
        assert adapter.P.shape[1] == adapter.Q.shape[0] == rank and adapter.lam.all()
        assert adapter.delta().shape == (adapter.P.shape[0], adapter.Q.shape[1])
    torch.testing.assert_close(adapters[0].delta(), branch, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_every_engine_leaves_the_same_adapters_on_every_rank(one_process: Any, engine: str) -> None:
    expected, pattern, _ = one_process
    for adapters, pattern_here, _ in run_ranks(2, train_and_gather, engine):
        assert pattern_here == pattern
        for here, there in zip(adapters, expected, strict=True):
            assert (here.name, here.scale) == (there.name, there.scale)
            for kind in ("P", "lam", "Q"):
                torch.testing.assert_close(getattr(here, kind), getattr(there, kind), rtol=1e-4, atol=1e-5)
