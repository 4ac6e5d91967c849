"""Where adapters go by themselves: not to heads, routers, towers, nor where they would be bypassed; what is said."""

import pytest
import torch
import transformers
from torch import nn

from adalora_dist.backbones.linears import is_plain_linear
from adalora_dist.config.methods import method_config
from adalora_dist.methods.inject import adapt
from adalora_dist.methods.shares import shares_line, weight_shares
from adalora_dist.methods.sites import trained_modules
from tests.support.models import Net, config
from tests.support.refusals import refusal

ALL = ("all-linear",)
TEXT = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
T5 = dict(vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
WHISPER = dict(
    vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=16, max_target_positions=16,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, classifier_proj_size=16,
)  # fmt: skip
MOE = TEXT | dict(num_experts_per_tok=2)
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)
BERT = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
MADE = {
    "T5ForQuestionAnswering": T5,
    "MT5ForQuestionAnswering": T5,
    "T5ForSequenceClassification": T5,
    "T5ForTokenClassification": T5,
    "WhisperForAudioClassification": WHISPER,
    "MixtralForCausalLM": MOE | dict(num_local_experts=4),
    "PhimoeForCausalLM": MOE | dict(num_local_experts=4),
    "Qwen2MoeForCausalLM": MOE | dict(num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24),
    "SwitchTransformersForConditionalGeneration": T5
    | dict(num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    "DeepseekV3ForCausalLM": MOE
    | dict(n_routed_experts=4, moe_intermediate_size=24, n_group=1, topk_group=1, first_k_dense_replace=1,
           kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4),
    "JambaForCausalLM": MOE | dict(num_experts=2, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
                                   attn_layer_period=2, attn_layer_offset=1, expert_layer_offset=1),
    "JetMoeForCausalLM": dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, kv_channels=8, num_key_value_heads=2,
        num_local_experts=2, num_experts_per_tok=2,
    ),
    "MambaForCausalLM": dict(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4),
    "RwkvForCausalLM": dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
    "LlavaForConditionalGeneration": dict(
        text_config=dict(model_type="llama", **TEXT), vision_config=dict(model_type="clip_vision_model", **VISION),
    ),
    "LlamaForCausalLM": TEXT,
    "BertForSequenceClassification": BERT,
}  # fmt: skip


def made(class_name: str) -> nn.Module:
    torch.manual_seed(0)
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**MADE[class_name]))


def adapted_leaves(class_name: str, *targets: str) -> set[str]:
    matrices = adapt(made(class_name), config(targets=targets or ALL))
    return {matrix.name.rpartition(".")[2] for matrix in matrices}


# ------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("class_name", "heads"),
    [
        ("T5ForQuestionAnswering", {"qa_outputs"}),
        ("MT5ForQuestionAnswering", {"qa_outputs"}),
        ("T5ForSequenceClassification", {"classification_head"}),
        ("T5ForTokenClassification", {"classifier"}),
        ("WhisperForAudioClassification", {"projector", "classifier"}),
        ("BertForSequenceClassification", {"classifier"}),
    ],
)
def test_a_head_is_trained_in_full_wherever_it_is(class_name, heads):
    model = made(class_name)
    settings = config(targets=ALL, train_modules=("task-head",))
    assert set(trained_modules(model, settings)) == heads
    matrices = adapt(model, settings)
    assert matrices and not any(m.name.partition(".")[0] in heads for m in matrices)
    in_head = {n: p for n, p in model.named_parameters() if n.partition(".")[0] in heads}
    assert in_head and all(p.requires_grad for p in in_head.values())


@pytest.mark.parametrize("class_name", ["T5Model", "BertModel"])
def test_a_plain_model_has_no_head(class_name):
    model_class = getattr(transformers, class_name)
    model = model_class(
        model_class.config_class(**(T5 if class_name == "T5Model" else MADE["BertForSequenceClassification"]))
    )
    assert "has nothing outside its backbone" in refusal(trained_modules, model, config(train_modules=("task-head",)))


def test_a_tied_head_is_refused_in_a_model_that_is_its_own_backbone():
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    assert "lm_head is tied" in refusal(trained_modules, model, config(train_modules=("task-head",)))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert trained_modules(model, config(train_modules=("task-head",))) == ["lm_head"]


def test_heads_of_models_within_a_model():
    berts = (transformers.BertConfig(**BERT), transformers.BertConfig(**BERT))
    both = transformers.EncoderDecoderModel(transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*berts))
    names = [m.name for m in adapt(both, config(targets=ALL))]
    assert len(names) == 2 * 6 + 2 * 10 + 1  # cross-attention, and the encoder's pooler
    assert not any("cls" in name for name in names)


# ----------------------------------------------------------------------------------------------------------- routers


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
EXPERTS = {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("class_name", "expected"),
    [
        ("MixtralForCausalLM", ATTENTION | EXPERTS),
        ("PhimoeForCausalLM", ATTENTION | EXPERTS),
        ("Qwen2MoeForCausalLM", ATTENTION | EXPERTS | {"gate_proj", "up_proj"}),  # of the shared expert
        ("SwitchTransformersForConditionalGeneration", {"q", "k", "v", "o", "wi", "wo"}),
    ],
)
def test_routers_are_not_adapted_unless_named(class_name, expected):
    assert adapted_leaves(class_name) == expected


def test_a_router_that_is_a_linear_map_can_be_named():
    assert adapted_leaves("Qwen2MoeForCausalLM", "shared_expert_gate") == {"shared_expert_gate"}
    assert adapted_leaves("SwitchTransformersForConditionalGeneration", "router.classifier") == {"classifier"}


def test_routers_within_experts_are_none_of_them():
    assert adapted_leaves("SwitchTransformersForConditionalGeneration", "experts") == {"wi", "wo"}
    message = refusal(adapt, made("JetMoeForCausalLM"), config(targets=("experts",)))
    assert "JetMoeForCausalLM has no experts that can be adapted" in message


def test_a_router_that_is_none_is_refused_by_name():
    message = refusal(adapt, made("PhimoeForCausalLM"), config(targets=("router",)))
    assert "router is a PhimoeTopKRouter, not a linear map" in message and "leave it out of targets" in message


class Remote(nn.Module):
    """As code from elsewhere has them: a gate that is a plain linear map beside a list of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.mlp = nn.ModuleDict({"gate": nn.Linear(4, 4)})  # a gated unit, without experts


def test_a_gate_beside_experts_is_a_router_and_another_is_not():
    names = [m.name for m in adapt(Remote(), config(targets=ALL))]
    assert names == ["experts.0", "experts.1", "mlp.gate"]


# ------------------------------------------------------------------------------------------------------------ towers


def test_towers_and_projections_are_left_out_unless_named():
    llava = "LlavaForConditionalGeneration"
    matrices = adapt(made(llava), config(targets=ALL))
    assert len(matrices) == 14 and all(m.name.startswith("model.language_model.") for m in matrices)
    named = adapt(made("LlavaForConditionalGeneration"), config(targets=(*ALL, "multi_modal_projector.linear_1")))
    assert len(named) == 15
    vision = adapt(made(llava), config(targets=(r"model\.vision_tower\..*proj",)))
    assert len(vision) == 4


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel"])
def test_published_positions_are_not_in_towers(method):
    adapters = adapt(made("LlavaForConditionalGeneration"), method_config(method))
    assert len(adapters) > 0 and all(a.name.startswith("model.language_model.") for a in adapters)


def test_a_model_of_vision_or_sound_alone_is_adapted():
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))
    assert len(adapt(vit, config(targets=ALL))) == 6
    whisper = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER))
    assert len(adapt(whisper, config(targets=ALL))) == 2 * 6 + 2 * 10


# ---------------------------------------------------------------------------------- weights that the model reads itself


@pytest.mark.parametrize(
    ("class_name", "left_out", "adapted"),
    [
        ("MambaForCausalLM", {"x_proj", "dt_proj", "out_proj"}, {"in_proj"}),
        ("JambaForCausalLM", {"dt_proj"}, {"in_proj", "x_proj", "q_proj"}),
        ("RwkvForCausalLM", {"output"}, {"key", "receptance"}),
    ],
)
def test_what_would_be_bypassed_is_left_out_and_refused_by_name(class_name, left_out, adapted):
    leaves = adapted_leaves(class_name)
    assert adapted <= leaves and not leaves & left_out
    for leaf in left_out:
        message = refusal(adapt, made(class_name), config(targets=(leaf,)))
        assert f"leave {leaf} out of targets" in message and "past an adapter" in message


@pytest.mark.parametrize("class_name", MADE)
def test_every_adapter_takes_part(class_name):
    """The check of checks: what is adapted moves the output, unless it is an expert that no token was sent to."""
    if class_name in ("WhisperForAudioClassification", "LlavaForConditionalGeneration"):
        pytest.skip("takes sound or pictures")
    model = made(class_name).eval()
    model.config.use_cache = False  # as it is loaded for training
    matrices = adapt(model, config(targets=ALL))
    nn.init.ones_(model.adalora.lam)
    ids = torch.arange(1, 25)[None]
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder and "Token" not in class_name else {}
    if class_name == "T5ForSequenceClassification":
        ids[0, -1] = model.config.eos_token_id
    output = model(input_ids=ids, **decoder)[0]
    output.square().sum().backward()
    idle = [m.name for m in matrices if m.P.grad is None or not m.P.grad.any()]
    assert all(".experts." in name for name in idle)


# ---------------------------------------------------------------------------------------------------- plain linear maps


class Tupled(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Clipped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-0.01, 0.01)


class Spelled(nn.Linear):
    def forward(self, x):
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 4, 6
        self.weight = nn.Parameter(torch.zeros(2, 4, 6))

    def forward(self, x, sizes):
        return x


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [(nn.Linear, True), (Spelled, True), (Tupled, False), (Clipped, False)],
)
def test_what_computes_a_linear_map(kind, expected, device):
    for bias in (True, False):
        assert is_plain_linear(kind(4, 6, bias=bias, device=device)) == expected


def test_a_stack_of_weights_is_no_linear_map():
    assert not is_plain_linear(Stacked())
    model = nn.Sequential(nn.Linear(4, 4), Stacked())
    assert [m.name for m in adapt(model, config(targets=ALL))] == ["0"]


# ------------------------------------------------------------------------------------------------------------- shares


def plain_size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("class_name", MADE)
def test_shares_add_up_to_the_model(class_name):
    model = made(class_name)
    size = plain_size(model)
    before = weight_shares(model)
    matrices = adapt(model, config(targets=ALL))
    shares = weight_shares(model)
    assert sum(shares.values()) == sum(before.values()) == size
    assert shares["adapted"] == sum(m.d_in * m.d_out * len(m.matrix_names()) for m in matrices)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_experts_that_stay_are_said_aloud():
    model = made("MixtralForCausalLM")
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    routers = sum(p.numel() for n, p in model.named_parameters() if ".gate." in n)
    size = plain_size(model)
    matrices = adapt(model, config(targets=tuple(ATTENTION)))
    shares = weight_shares(model)
    assert shares["experts"] == experts > size / 2 and shares["routers"] == routers > 0
    line = shares_line(shares, len(matrices))
    assert line.startswith(f"adapted 8 matrices = {100 * shares['adapted'] / size:.0f} % of the model's weights; not ")
    assert f"experts {100 * experts / size:.0f} %" in line and "\n" not in line


def test_shares_by_kind():
    model = made("LlavaForConditionalGeneration")
    tower = sum(p.numel() for n, p in model.named_parameters() if "vision_tower" in n or "projector" in n)
    adapt(model, config(targets=ALL))
    assert weight_shares(model)["vision and audio"] == tower
    model = made("MambaForCausalLM")
    read = sum(p.numel() for n, p in model.named_parameters() if "_proj.weight" in n and "in_proj" not in n)
    adapt(model, config(targets=ALL))
    assert weight_shares(model)["linear maps whose weight the model reads itself"] == read


def test_what_is_trained_in_full_and_what_is_no_target():
    model = Net()
    adapt(model, config(targets=("up",), train_modules=("head",)))
    size = plain_size(Net())
    assert weight_shares(model) == {
        "adapted": 2 * 7 * 13, "other linear maps": 2 * 7 * 13, "norms and biases": 2 * (7 + 13), "trained in full": 24,
    }  # fmt: skip
    assert weight_shares(Net().requires_grad_(True)) == {"trained in full": size}
    assert shares_line({"trained in full": size}, 0) == "trained in full: 100 %"
    line = shares_line({"embeddings": 9990, "trained in full": 9, "norms and biases": 1}, 0)
    assert line == "trained in full: 0.1 %; not trained: embeddings 100 %, norms and biases <0.1 %"
