"""Losses without a mask where none is needed, and with logits chunk by chunk: the same numbers, counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from adalora_dist.config.sections import RunConfig, TrainConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods.inject import adapt
from adalora_dist.tasks import padding, token_losses
from adalora_dist.tasks.batches import BatchPlan, collate
from adalora_dist.tasks.losses import causal_loss, seq2seq_loss
from adalora_dist.tasks.padding import is_purely_causal
from adalora_dist.tasks.rows.tokens import IGNORED
from adalora_dist.tasks.token_losses import AUTO_LOGITS, TokenLosses, automatic_chunk, logits_bytes
from adalora_dist.training.engine import build_accelerator
from adalora_dist.training.loop import train
from adalora_dist.training.prepared import prepare
from adalora_dist.training.run_folder import RunFolder
from tests.support.adapted_models import build
from tests.support.memory import peak_bytes
from tests.support.model_sweep import CHANGES, class_names
from tests.support.models import config
from tests.support.paths import ROOT
from tests.support.quantized_runs import environment
from tests.support.ranks import run_ranks
from tests.support.tiny_any import VOCABULARY, CannotBeTiny, tiny_model
from tests.support.tiny_language_model import tiny_llama

sys.path.insert(0, str(ROOT / "benchmarks"))
from operations import Counts  # noqa: E402

CPU = torch.device("cpu")
SLOW = [("fsdp2", False), ("zero3", True), ("ddp", False), ("ddp", True)]


def some_rows(vocabulary: int = 48, lengths: tuple[int, ...] = (9, 5, 12)) -> list[Any]:
    """Rows of unequal lengths; the first two tokens of each are no targets."""
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": [IGNORED] * 2 + ids[2:]} for ids in sequences]


def loss_and_gradients(model: Any, loss_sum: Any, indices: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    loss = loss_sum(model, indices)
    (loss * 0.3).backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


# ---- masks


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_without_a_mask_loss_and_gradients_are_the_same(kind, attention, monkeypatch):
    """To the last bit, but for what some CPUs' sdpa rounds otherwise without one."""
    model, rows, outcomes = build(kind, attn_implementation=attention), some_rows(), []
    model.set_attn_implementation(attention)
    for is_left_out in (True, False):
        monkeypatch.setattr(padding, "is_purely_causal", lambda _, answer=is_left_out: answer)
        outcomes.append(loss_and_gradients(model, causal_loss(rows, 0, CPU), [0, 1, 2]))
    (bare, bare_gradients), (masked, gradients) = outcomes
    assert torch.equal(bare, masked) and len(gradients) > 10
    room = 2e-6 if attention == "sdpa" else 0
    assert all((a - b).abs().max() <= room * b.abs().max() for a, b in zip(bare_gradients, gradients, strict=True))


def test_a_forward_has_no_operation_and_no_host_read_for_padding():
    """Counted beside a forward of the model that is given tokens alone."""
    model, rows = build("llama").train(), some_rows()
    loss_sum, counted = causal_loss(rows, 0, CPU), {}
    loss_sum(model, [0])  # how the model ends is tried once
    batch = collate(rows, 0)
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: loss_sum(model, [0, 1, 2]),
        "bare": lambda: model.model(input_ids=batch["input_ids"]),
        "masked": lambda: model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]),
    }
    for name, call in calls.items():
        within = counted[name] = Counts()
        original = model.model.forward

        def forward(*arguments: Any, _to: Counts = within, _do: Any = original, **named: Any) -> Any:
            with _to.with_host_reads():
                return _do(*arguments, **named)

        model.model.forward = forward
        call()
        del model.model.forward
    assert counted["ours"].aten == counted["bare"].aten and counted["ours"].host_reads.total() == 0
    assert counted["masked"].aten.total() > counted["bare"].aten.total() + 20
    assert counted["masked"].host_reads.total() > 0


def test_a_mask_is_kept_where_something_is_read_both_ways():
    class Own(transformers.LlamaForCausalLM):
        """Of the user."""

    assert is_purely_causal(build("llama")) and is_purely_causal(build("gpt2"))
    assert not is_purely_causal(build("bart")) and not is_purely_causal(build("gpt2", add_cross_attention=True))
    assert not is_purely_causal(tiny_model(transformers.BertLMHeadModel))
    assert is_purely_causal(tiny_model(transformers.BertLMHeadModel, is_decoder=True))
    assert not is_purely_causal(tiny_model(transformers.Gemma3ForCausalLM, use_bidirectional_attention=True))
    assert not is_purely_causal(tiny_model(transformers.MambaForCausalLM))  # says nothing about it
    assert not is_purely_causal(Own(build("llama").config))
    bidirectional = build("llama")
    bidirectional.config.is_causal = False
    assert not is_purely_causal(bidirectional)


@pytest.mark.slow
def test_no_class_of_transformers_needs_a_mask_that_is_left_out():
    """Real tokens' logits beside padding, of every causal class that is taken for purely causal."""
    tokens = torch.randint(5, VOCABULARY - 4, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    tokens[1, 11:], mask[1, 11:] = 0, 0
    tried = []
    for name in class_names("AutoModelForCausalLM"):
        changes = next((value for start, value in CHANGES.items() if name.startswith(start)), {})
        try:
            model = tiny_model(getattr(transformers, name), **changes).eval()
            with torch.no_grad():
                masked = model(input_ids=tokens, attention_mask=mask).logits
        except CannotBeTiny:
            continue
        except Exception:  # noqa: BLE001 - by itself it does not run so small
            continue
        if not is_purely_causal(model):
            continue
        with torch.no_grad():
            bare = model(input_ids=tokens).logits
        tried.append(name)
        torch.testing.assert_close(bare[mask.bool()], masked[mask.bool()], rtol=0, atol=1e-6, msg=name)
    assert len(tried) > 60 and {"LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM"} <= set(tried)


# ---- logits in chunks


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_chunks_have_the_loss_and_gradients_of_the_whole(kind, trained_head):
    model, rows = build(kind, tie_word_embeddings=False), some_rows()
    model.get_output_embeddings().requires_grad_(trained_head)
    whole, gradients = loss_and_gradients(model, causal_loss(rows, 0, CPU, 0), [0, 1, 2])
    for size in (1, 4, 1000):
        loss, of_chunks = loss_and_gradients(model, causal_loss(rows, 0, CPU, size), [0, 1, 2])
        torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
        assert len(of_chunks) == len(gradients)
        for a, b in zip(of_chunks, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(causal_loss(rows, 0, CPU, 4)(model, [0, 1, 2]), whole, rtol=1e-6, atol=0)
    assert "forward" not in vars(model.get_output_embeddings()) and not model.training


def test_no_target_gives_no_loss_and_no_gradient():
    model, rows = build("llama"), [{"input_ids": [5, 6, 7], "labels": [IGNORED] * 3}]
    for indices in ([], [0]):
        loss, gradients = loss_and_gradients(model, causal_loss(rows, 0, CPU, 1), indices)
        assert loss == 0 and not any(gradient.any() for gradient in gradients)


def test_a_model_that_ignores_which_logits_to_keep_has_the_same_loss():
    model, rows = build("llama"), some_rows()
    expected = causal_loss(rows, 0, CPU, 0)(model, [0, 1, 2]).detach()
    plain = model.forward
    model.forward = lambda logits_to_keep=0, **inputs: plain(**inputs)
    for size in (0, 4):
        torch.testing.assert_close(causal_loss(rows, 0, CPU, size)(model, [0, 1, 2]), expected, rtol=1e-6, atol=0)
    model.get_output_embeddings = lambda: None  # nor can its head be told
    torch.testing.assert_close(causal_loss(rows, 0, CPU, 0)(model, [0, 1, 2]), expected, rtol=1e-6, atol=0)


def test_the_loss_is_not_rounded_with_the_models_outputs():
    """FSDP2's mixed precision gives logits in 16 bits; the loss passes them by, and so does its gradient."""
    model, rows = build("llama"), some_rows()
    expected, gradients = loss_and_gradients(model, causal_loss(rows, 0, CPU, 4), [0, 1, 2])

    def rounded(_module: Any, _inputs: Any, output: Any) -> Any:
        output.logits = output.logits.bfloat16()
        return output

    with model.register_forward_hook(rounded):
        loss, of_rounded = loss_and_gradients(model, causal_loss(rows, 0, CPU, 4), [0, 1, 2])
    assert torch.equal(loss, expected)
    assert all(torch.equal(a, b) for a, b in zip(of_rounded, gradients, strict=True))


def test_a_model_that_changes_its_logits_makes_them_at_once():
    model, rows = tiny_model(transformers.Gemma2ForCausalLM, final_logit_softcapping=5.0), some_rows()
    batch = collate(rows, 0)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    for size in ("auto", 0):
        torch.testing.assert_close(causal_loss(rows, 0, CPU, size)(model, [0, 1, 2]), expected, rtol=1e-6, atol=0)
    with pytest.raises(UserError, match="logits_chunk=4: Gemma2ForCausalLM does something to its logits"):
        causal_loss(rows, 0, CPU, 4)(model, [0])


def test_an_encoder_decoder_makes_no_logits_of_padding(monkeypatch):
    """BART adds a bias to its logits, T5 does not and so can chunk them."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(3, 40, (n,), generator=generator).tolist(), "labels": list(range(3, 3 + m))}
        for n, m in ((9, 3), (5, 11), (7, 6))
    ]
    for model, sizes in ((build("bart"), ("auto",)), (tiny_model(transformers.T5ForConditionalGeneration), (0, 4))):
        model.eval()
        seen: list[int] = []
        head = model.get_output_embeddings()
        plain = type(head).forward
        monkeypatch.setattr(type(head), "forward", lambda s, x, p=plain, h=head, n=seen: (
            n.append(x.numel() // x.shape[-1]) if s is h else None, p(s, x))[1])  # fmt: skip
        sums = [
            sum(seq2seq_loss(rows, 0, 2, CPU, size)(model, [i]) for i in range(3)).detach() for size in sizes
        ] + [seq2seq_loss(rows, 0, 2, CPU, size)(model, [0, 1, 2]).detach() for size in sizes]  # fmt: skip
        monkeypatch.undo()
        assert max(sums) - min(sums) < 1e-5 * float(sums[0])
        assert set(seen) <= {3, 11, 6, 20, 4, 2}  # 20 targets, not 3 x 11; or chunks of 4 and what is left


def test_auto_bounds_what_logits_take():
    assert logits_bytes(8192, 128_256) <= 2e9 < 16e9 < logits_bytes(8192, 128_256, 0)
    assert automatic_chunk(128_256) == AUTO_LOGITS // 128_256 == 523 and automatic_chunk(2**30) == 1


def test_the_peak_is_that_of_the_formula(monkeypatch):
    """A head alone, 2,048 targets of 4,001 words: measured by the allocator."""
    vocabulary, num_targets = 4001, 2048
    monkeypatch.setattr(token_losses, "AUTO_LOGITS", 128 * vocabulary)
    model = tiny_llama(vocabulary, 16)
    model.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(True)
    inputs = {"input_ids": torch.randint(3, vocabulary, (4, num_targets // 4))}
    peaks = {}
    for size in ("auto", 0):
        losses = TokenLosses(size)
        losses(model, inputs, inputs["input_ids"])  # tries how the model ends
        peaks[size] = peak_bytes(lambda do=losses: do(model, inputs, inputs["input_ids"]).backward())
    # float32 here: logits, log-probabilities and their gradient; the model's own activations are below a chunk's.
    whole, chunk = (12 * vocabulary * n for n in (num_targets, 128))
    assert peaks[0] > 0.9 * whole
    assert peaks["auto"] < 4 * chunk < peaks[0] / 3


# ---- engines


def trained(rank: int, world_size: int, engine: str, size: Any, with_head: bool, folder: str) -> list[float]:
    """Losses of five steps on two processes."""
    rows = some_rows(lengths=(9, 5, 12, 7, 11, 6, 8, 10))
    head = ("lm_head",) if with_head else ()
    adapter = config("lora", init_rank=3, targets=("all-linear",), train_modules=head, dropout=0.1)
    training = TrainConfig(
        output_dir=f"{folder}/{engine}-{size}-{with_head}", max_steps=5, batch_size=4, micro_batch_size=4,
        learning_rate=5e-2, lr_warmup_ratio=0, precision="fp32",
    )  # fmt: skip
    settings = RunConfig(adapter=adapter, train=training)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(engine).items():
            patch.setenv(name, value.replace("True", "False") if "INIT" in name else value)
        accelerator = build_accelerator(training)
    model = build("llama", tie_word_embeddings=False)
    if engine == "zero3":
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    adapt(model, adapter, seed=1)
    prepared = prepare(accelerator, model, settings, 5)
    plan, report = BatchPlan.of_rows(rows, 4, 3, False), RunFolder(settings, rank == 0, {})
    loss_sum = causal_loss(rows, 0, accelerator.device, size)
    return train(accelerator, prepared, plan, loss_sum, settings, report, lambda _: None)


@pytest.mark.parametrize(
    ("engine", "with_head"),
    [("fsdp2", True), ("zero3", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_engines_gather_the_head_as_ever(engine, with_head, tmp_path):
    whole, chunks = (run_ranks(2, trained, engine, size, with_head, str(tmp_path))[0] for size in (0, 4))
    assert whole[-1] < whole[0]
    torch.testing.assert_close(torch.tensor(chunks), torch.tensor(whole), rtol=2e-6, atol=0)
