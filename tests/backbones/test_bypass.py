"""Which linear maps a model computes with by their weights, read from its source; and that nothing else is named."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from adalora_dist.backbones.bypass import weights_read_directly
from adalora_dist.backbones.linears import linear_shape


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if linear_shape(module)]


def read_in(class_name: str, **changes) -> set[str]:
    """Last parts of the names that are read directly in a model of the class, of its default size, on meta."""
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**changes)
    with torch.device("meta"):
        model = model_class(config)
    return {name.rpartition(".")[2] for name in weights_read_directly(model, linear_names(model))}


@pytest.mark.parametrize(
    ("class_name", "expected"),
    [
        ("MambaForCausalLM", {"x_proj", "dt_proj", "out_proj"}),
        ("FalconMambaForCausalLM", {"x_proj", "dt_proj", "out_proj"}),
        ("Mamba2ForCausalLM", {"out_proj"}),
        ("BambaForCausalLM", {"out_proj"}),
        ("JambaForCausalLM", {"dt_proj"}),
        ("Zamba2ForCausalLM", {"out_proj"}),
        ("RwkvForCausalLM", {"output", "value"}),  # divided in place for evaluation
        ("WavLMForSequenceClassification", {"q_proj", "k_proj", "v_proj", "out_proj"}),
        ("Gemma3nForCausalLM", {"prediction_coefs", "correction_coefs"}),
        # its reversible layers are computed where no graph is made, and again in their own backward
        ("ReformerForSequenceClassification", {"query_key", "query", "key", "value", "dense"}),
        # their weights are asked for a type, or not at all
        ("LlamaForCausalLM", set()),
        ("GPT2LMHeadModel", set()),
        ("T5ForConditionalGeneration", set()),
        ("NllbMoeForConditionalGeneration", set()),
        ("BertForSequenceClassification", set()),
        ("DebertaForSequenceClassification", set()),
        ("FalconForCausalLM", set()),
        ("BartForConditionalGeneration", set()),
        ("BloomForCausalLM", set()),
    ],
)
def test_models_of_transformers(class_name, expected):
    assert read_in(class_name) == expected


def test_a_models_settings_decide():
    assert read_in("BloomForCausalLM", pretraining_tp=2, slow_but_exact=True) == {"dense", "dense_4h_to_h"}
    assert read_in("BloomForCausalLM", pretraining_tp=2, slow_but_exact=False) == set()


def matmul(module, x):
    return torch.matmul(x, module.weight.T)


def run(module, x):
    return module(x)


class Base(nn.Module):
    def __init__(self, switch: bool = True) -> None:
        super().__init__()
        self.switch = switch
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.stack = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        with torch.no_grad():
            self.a.weight.mul_(2)  # building is not computing


class Called(Base):
    def forward(self, x):
        x = x.to(self.a.weight.dtype).to(self.b.weight.device)
        if self.c.weight is not None and isinstance(self.c.weight, torch.Tensor) and self.c.weight.shape[0] == 4:
            x = run(self.c, self.a(x))
        return self.b(x)


class Functional(Base):
    def forward(self, x):
        return self.b(F.linear(x, self.a.weight, self.a.bias))


class Aliased(Base):
    def forward(self, x):
        layer = self.a
        w, other = layer.weight, getattr(self, "b").weight  # noqa: B009
        return x @ w @ other


class Looped(Base):
    def forward(self, x):
        for index, layer in enumerate(self.stack):
            x = x @ layer.weight + index
        return sum(x @ m.weight for m in self.stack)


class Handed(Base):
    def forward(self, x):
        return self.step(self.b, matmul(self.a, x), scale=2)

    def step(self, layer, x, scale):
        return F.linear(x, layer.weight) * scale


class Switched(Base):
    def forward(self, x):
        if self.switch and x.ndim == 2:
            return x @ self.a.weight
        return x @ self.b.weight if not self.switch else self.c(x)


class Inherited(Functional):
    """Its forward is its base's."""


class Overridden(Functional):
    def forward(self, x):
        return self.a(x)


class Extended(Functional):
    def forward(self, x):
        return super().forward(self.a(x))


class Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layers, last):
        return last(layers[1](layers[0](x)))


class Reversed(Base):
    def forward(self, x):
        return self.c(Reversible.apply(x, self.stack, self.a))


class FromAbove(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Called()])

    def forward(self, x):
        return x @ self.inner[0].a.weight


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Called(), set()),
        (Functional(), {"a"}),
        (Aliased(), {"a", "b"}),
        (Looped(), {"stack.0", "stack.1"}),
        (Handed(), {"a", "b"}),
        (Switched(True), {"a"}),
        (Switched(False), {"b"}),
        (Inherited(), {"a"}),
        (Overridden(), set()),
        (Extended(), {"a"}),
        (FromAbove(), {"inner.0.a"}),
        (Reversed(), {"stack.0", "stack.1", "a"}),
        (nn.MultiheadAttention(4, 2), {"out_proj"}),
        (nn.TransformerEncoderLayer(4, 2, 8), {"self_attn.out_proj", "linear1", "linear2"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_ways_to_read_a_weight(model, expected):
    found = weights_read_directly(model, linear_names(model))
    assert set(found) == expected
    assert weights_read_directly(model, ["none", *linear_names(model)]) == found
