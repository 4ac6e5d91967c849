"""Which losses transformers' Trainer multiplies by accumulation x processes: as the source says, and as they behave."""

import pytest
import torch
import transformers
from transformers import Trainer, TrainingArguments

from adalora_dist.methods.inject import adapt
from adalora_dist.training.trainer_callback import AdaLoraCallback
from adalora_dist.training.trainer_loss import ignores_number_of_items, multiplied_loss
from tests.support.models import config
from tests.support.refusals import refusal

VOCABULARY, LENGTH = 32, 6
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
)  # fmt: skip
LLAMA = dict(
    vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
    num_key_value_heads=1, pad_token_id=0,
)  # fmt: skip
GPT = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16, pad_token_id=0)
T5 = dict(
    vocab_size=VOCABULARY, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0,
    dropout_rate=0.0,
)  # fmt: skip
BART = dict(
    vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, pad_token_id=0, decoder_start_token_id=2,
    max_position_embeddings=16, dropout=0.0,
)  # fmt: skip
CLASSES = [
    ("LlamaForCausalLM", LLAMA),
    ("MixtralForCausalLM", LLAMA | dict(num_local_experts=2)),
    ("GPT2LMHeadModel", GPT),
    ("T5ForConditionalGeneration", T5),
    ("MT5ForConditionalGeneration", T5),
    ("BartForConditionalGeneration", BART),
    ("BertForSequenceClassification", SIZES),
    ("RobertaForSequenceClassification", SIZES),
    ("LlamaForSequenceClassification", LLAMA),
    ("LlamaForSequenceClassification", LLAMA | dict(num_labels=1)),
    ("GPT2ForSequenceClassification", GPT),
    ("DebertaV2ForSequenceClassification", SIZES),
    ("BertForTokenClassification", SIZES),
    ("BertForMaskedLM", SIZES),
    ("LlamaForTokenClassification", LLAMA),
]


def made(class_name: str, sizes: dict) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**sizes)).eval()


def batch_for(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    ids = torch.arange(2 * LENGTH).view(2, LENGTH) + 3
    if "Sequence" in type(model).__name__:
        is_number = model.config.num_labels == 1
        return {"input_ids": ids, "labels": torch.tensor([0.0, 1.0] if is_number else [0, 1])}
    return {"input_ids": ids, "labels": ids % 2 if "Token" in type(model).__name__ else ids}


@pytest.mark.parametrize(("class_name", "sizes"), CLASSES, ids=[name for name, _ in CLASSES])
def test_the_source_says_what_the_loss_does(class_name, sizes, tmp_path):
    model = made(class_name, sizes)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    is_given_the_number = Trainer(model, args).model_accepts_loss_kwargs
    ignores = False
    if is_given_the_number:
        batch = batch_for(model)
        ignores = torch.equal(*(model(**batch, num_items_in_batch=torch.tensor(n)).loss for n in (7, 14)))
    assert ignores_number_of_items(model) == ignores
    assert (multiplied_loss(model, 2, 3, 0.0) is not None) == ignores
    assert multiplied_loss(model, 1, 1, 0.0) is None
    assert multiplied_loss(model, 2, 3, 0.1) is None  # Trainer's own loss, which divides
    model.accepts_loss_kwargs = False
    assert not ignores_number_of_items(model)


def losses(folder, accumulation: int, remedy: bool) -> list[float]:
    """Of two steps of a T5 on the same rows, all of one length, so that means of means are means."""
    model = made("T5ForConditionalGeneration", T5)
    settings = config(targets=("all-linear",), initial_warmup_steps=0, final_steps=1, mask_interval_steps=1)
    adapt(model, settings)
    if remedy:
        model.accepts_loss_kwargs = False
    generator = torch.Generator().manual_seed(1)
    rows = [dict.fromkeys(("input_ids", "labels"), x) for x in torch.randint(3, 31, (12, LENGTH), generator=generator)]
    args = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4 // accumulation, learning_rate=1e-2,
        gradient_accumulation_steps=accumulation, train_sampling_strategy="sequential", logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[AdaLoraCallback(settings)])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_multiplied_loss_is_refused_and_the_remedy_is_right(tmp_path):
    message = refusal(losses, tmp_path, 2, False)
    assert "gradient_accumulation_steps=2 on 1 process(es)" in message and "2 times too large" in message
    assert "model.accepts_loss_kwargs = False" in message
    whole = losses(tmp_path, 1, False)
    assert losses(tmp_path, 2, True) == pytest.approx(whole, rel=1e-4)
