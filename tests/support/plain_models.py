"""Tiny models of many kinds as they are saved, and the automatic class that each is loaded by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as tf

V = 64
ENCODER: dict[str, Any] = dict(
    vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip
DECODER: dict[str, Any] = dict(
    vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
BART = tf.BartConfig(
    vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24,
    encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32,
)  # fmt: skip
T5 = tf.T5Config(vocab_size=V, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
GPT2 = tf.GPT2Config(vocab_size=V, n_positions=32, n_embd=16, n_layer=2, n_head=2)
VIT = tf.ViTConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8
)
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)
GEMMA3 = tf.Gemma3Config(text_config={**DECODER, "head_dim": 8, "sliding_window": 16}, vision_config=VISION)
LLAVA = tf.LlavaConfig(text_config=tf.LlamaConfig(**DECODER), vision_config=tf.CLIPVisionConfig(**VISION))
ALBERT = tf.AlbertConfig(
    vocab_size=V, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=2
)
DISTILBERT = tf.DistilBertConfig(vocab_size=V, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=32)
MARIAN = tf.MarianConfig(**(BART.to_dict() | {"pad_token_id": 0, "decoder_vocab_size": V}))
ROUTED: dict[str, Any] = dict(
    n_routed_experts=4, moe_intermediate_size=8, n_group=1, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1
)

CLASSIFIER, ANSWERS = tf.AutoModelForSequenceClassification, tf.AutoModelForQuestionAnswering
CAUSAL, SEQ2SEQ, IMAGES = tf.AutoModelForCausalLM, tf.AutoModelForSeq2SeqLM, tf.AutoModelForImageTextToText

PLAIN: dict[str, tuple[Callable[[], Any], Any]] = {
    "bert without pooler": (lambda: tf.BertForMaskedLM(tf.BertConfig(**ENCODER)), CLASSIFIER),
    "bert without prefix": (lambda: tf.BertModel(tf.BertConfig(**ENCODER)), CLASSIFIER),
    "bert for answers": (lambda: tf.BertModel(tf.BertConfig(**ENCODER)), ANSWERS),
    "roberta": (lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**ENCODER)), CLASSIFIER),
    "electra": (lambda: tf.ElectraForPreTraining(tf.ElectraConfig(**ENCODER, embedding_size=8)), CLASSIFIER),
    "distilbert": (lambda: tf.DistilBertForMaskedLM(DISTILBERT), CLASSIFIER),
    "albert": (lambda: tf.AlbertForMaskedLM(ALBERT), CLASSIFIER),
    "deberta": (lambda: tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**ENCODER)), CLASSIFIER),
    "modernbert": (lambda: tf.ModernBertForMaskedLM(tf.ModernBertConfig(**ENCODER)), CLASSIFIER),
    "vit": (lambda: tf.ViTModel(VIT), tf.AutoModelForImageClassification),
    "gpt2": (lambda: tf.GPT2LMHeadModel(GPT2), CAUSAL),
    "gpt2 without prefix": (lambda: tf.GPT2Model(GPT2), CAUSAL),
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)), CAUSAL),
    "llama tied": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, tie_word_embeddings=True)), CAUSAL),
    "llama classifies": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)), CLASSIFIER),
    "phi3": (lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**DECODER)), CAUSAL),
    "gemma3": (lambda: tf.Gemma3ForConditionalGeneration(GEMMA3), IMAGES),
    "llava": (lambda: tf.LlavaForConditionalGeneration(LLAVA), IMAGES),
    "t5": (lambda: tf.T5ForConditionalGeneration(T5), SEQ2SEQ),
    "t5 for answers": (lambda: tf.T5ForConditionalGeneration(T5), ANSWERS),
    "t5 classifies": (lambda: tf.T5ForConditionalGeneration(T5), CLASSIFIER),
    "bart": (lambda: tf.BartForConditionalGeneration(BART), SEQ2SEQ),
    "bart classifies": (lambda: tf.BartModel(BART), CLASSIFIER),
    "marian": (lambda: tf.MarianMTModel(MARIAN), SEQ2SEQ),
}
"""What is saved, and what it is loaded as. Every tensor of the files becomes one of the model."""

REARRANGED: dict[str, tuple[Callable[[], Any], Any]] = {
    "nomic": (lambda: tf.NomicBertModel(tf.NomicBertConfig(**ENCODER)), CLASSIFIER),
    "gte": (lambda: tf.GteModel(tf.GteConfig(**ENCODER)), CLASSIFIER),
    "jina": (lambda: tf.JinaEmbeddingsV3Model(tf.JinaEmbeddingsV3Config(**ENCODER)), CLASSIFIER),
}
"""Files have queries, keys and values in one tensor, models in three."""

EXPERTS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, num_local_experts=4)),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(
            **DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
        )
    ),
    "glm4_moe": lambda: tf.Glm4MoeForCausalLM(tf.Glm4MoeConfig(**DECODER, **ROUTED, head_dim=8)),
    "deepseek_v3": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **DECODER, **ROUTED, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8
        )
    ),
}
"""Files have a tensor for each expert, models one for all."""
