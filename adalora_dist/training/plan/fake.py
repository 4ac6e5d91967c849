"""Two steps of a run on fake tensors: the recipe's model, our adapters, loss, optimizer and hooks, and no memory.

Fake tensors have shapes and types and no values, so a 70B model takes none, and the code is the run's own: what is
counted is what it allocates. One process; what engines make of it is arithmetic (``memory.py``). A value that the host
reads within a step would raise here.

Layers of one kind cost the same each, so models with many are measured at two depths and continued in a straight line.
That is checked on the number of parameters, which is known.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

from adalora_dist.backbones.activations import checkpoint_activations
from adalora_dist.backbones.fit import lengths_of
from adalora_dist.config.methods import AdaptiveConfig
from adalora_dist.config.sections import RunConfig
from adalora_dist.io.errors import UserError
from adalora_dist.methods import method_for
from adalora_dist.methods.hooks import attach
from adalora_dist.methods.inject import adapt
from adalora_dist.tasks.losses import causal_loss, classification_loss, seq2seq_loss, span_loss
from adalora_dist.tasks.rows.tokens import IGNORED
from adalora_dist.tasks.token_losses import automatic_chunk
from adalora_dist.training.plan.live import LiveBytes

_DEPTHS = (2, 4)
_DEPTH_FIELDS = ("num_hidden_layers", "decoder_layers", "num_decoder_layers")
_WITHOUT_VALUES = (
    RuntimeError, LookupError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError, ImportError,
)  # fmt: skip
"""What a model's code, which is somebody else's, may come to where it asks for values, or for kernels, that there are
not."""
_NUM_STEPS = 1000
"""Of the run that the two steps belong to: neither of them is at its end."""


class NotPlanned(UserError):
    """A step that cannot be made without values: no mistake of the user's, and a run may well make it."""


@dataclass(frozen=True)
class StepBytes:
    """What one process holds, in bytes, when it shards nothing."""

    num_parameters: int
    weights: int
    """Of the backbone as it is stored, and all that is trained."""
    activations: int
    """The most that a step needs on top of these and of what lasts from step to step, as moments do: what forward keeps
    for backward, logits, gradients as they come."""

    def continued(self, other: StepBytes, depths: tuple[int, int], depth: int) -> StepBytes:
        """To ``depth`` layers, from this one and another with ``depths`` of them."""
        (first, second), parts = depths, zip(astuple(self), astuple(other), strict=True)
        return StepBytes(*(a + (b - a) * (depth - first) // (second - first) for a, b in parts))


def step_bytes(config: RunConfig, auto_class: Any, settings: Any, dtype: torch.dtype, micro_batch: int) -> StepBytes:
    """Of one process that trains ``micro_batch`` sequences as long as the run's settings allow.

    Args:
        settings: the model's own configuration.
        dtype: that its weights are stored in.

    Raises:
        NotPlanned: the model's or the method's code does not run on fake tensors.
    """
    depth = getattr(settings, "num_hidden_layers", 0)
    try:
        if depth > _DEPTHS[1]:
            found = [_measured(config, auto_class, _cut(settings, k), dtype, micro_batch) for k in _DEPTHS]
            whole = found[0].continued(found[1], _DEPTHS, depth)
            if whole.num_parameters == _num_parameters(auto_class, settings):
                return whole
        return _measured(config, auto_class, settings, dtype, micro_batch)
    except _WITHOUT_VALUES as error:
        reason = " ".join(str(error).split())[:150]
        architecture = (settings.architectures or [type(settings).__name__])[0]
        raise NotPlanned(
            f"a step of {architecture} with method {config.adapter.method} cannot be made on fake tensors ({reason}): "
            "measure its memory with a short run, --max-steps 5"
        ) from error


class _HostReads(TorchDispatchMode):
    """Where no step is made yet, what the host reads of a fake tensor is 0: seeds that methods draw, checks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags and isinstance(args[0], FakeTensor):
            return 0
        return func(*args, **(kwargs or {}))


def _cut(settings: Any, depth: int) -> Any:
    """The configuration of a model with fewer layers."""
    cut = copy.deepcopy(settings)
    for name in _DEPTH_FIELDS:
        if hasattr(cut, name):
            setattr(cut, name, depth)
    if getattr(cut, "layer_types", None):
        cut.layer_types = cut.layer_types[:depth]
    return cut


def _num_parameters(auto_class: Any, settings: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in auto_class.from_config(settings).parameters())


def _measured(config: RunConfig, auto_class: Any, settings: Any, dtype: torch.dtype, micro_batch: int) -> StepBytes:
    # Rows are real, and what the model makes of them alone stays so: a mask, positions.
    mode, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    section, train = config.adapter, config.train
    if isinstance(section, AdaptiveConfig):  # importance advances from the first step on
        section = section.model_copy(update={"initial_warmup_steps": None, "final_steps": None, "compact": False})
    with live, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mode:
            model = auto_class.from_config(
                copy.deepcopy(settings), dtype=torch.float32 if section.trains_backbone else dtype
            )
            num_parameters = sum(p.numel() for p in model.parameters())
            with _HostReads():  # type: ignore[no-untyped-call]
                adapt(model, section, train.seed)
            # What goes to the host is counted as if it stayed.
            checkpoint_activations(model, train.model_copy(update={"offload_activations": False}))
            weights = live.now
            optimizer = method_for(section).optimizer(model, train)
            hooks = attach(model, optimizer, section, _NUM_STEPS)
        loss_sum, rows = _loss(config, auto_class, model, micro_batch)
        parameters = [p for p in model.parameters() if p.requires_grad]
        model.train()
        state = 0
        for _ in range(2):  # in the second, the optimizer's state is there
            state = live.now - weights
            live.restart()
            with _autocast(train.precision):
                loss = loss_sum(model, rows)
            loss.backward()
            with mode:
                if train.max_grad_norm > 0:
                    clip_grad_norm_(parameters, train.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            del loss
        hooks.detach()
    return StepBytes(num_parameters, weights, live.peak - weights - state)


def _autocast(precision: str) -> AbstractContextManager[Any]:
    return nullcontext() if precision == "fp32" else torch.autocast("cpu", torch.bfloat16)  # both types have 16 bits


def longest(config: RunConfig) -> int:
    """Tokens of the longest sequence that the settings allow; with two sides those of both."""
    lengths = {setting: tokens for setting, tokens, _ in lengths_of(config)}
    return lengths.get("max_length") or lengths.get("max_source_length", 512) + lengths.get("max_target_length", 0)


def _loss(config: RunConfig, auto_class: Any, model: Any, micro_batch: int) -> tuple[Any, list[int]]:
    """The loss of the model's kind over rows as long as the settings allow, and the rows' indices."""
    lengths = {setting: tokens for setting, tokens, _ in lengths_of(config)}
    kind, device = auto_class.__name__, torch.device("cpu")
    length = lengths.get("max_length") or lengths.get("max_source_length") or 512
    row: dict[str, Any] = {"input_ids": [3] * length, "attention_mask": [1] * length}
    indices = list(range(micro_batch))
    if "CausalLM" in kind:
        vocabulary = int(model.config.get_text_config().vocab_size)
        chunk = cast(Any, config.train).logits_chunk
        size = automatic_chunk(vocabulary) if chunk == "auto" else chunk or micro_batch * length
        num_targets = max(1, min(length, size // micro_batch))  # logits of as many are alive at a time
        row["labels"] = [IGNORED] * (length - num_targets) + [3] * num_targets
        return causal_loss([cast(Any, row)] * micro_batch, 0, device, 0), indices
    if "Seq2Seq" in kind:
        row["labels"] = [3] * lengths.get("max_target_length", length)
        return seq2seq_loss([row] * micro_batch, 0, 2, device), indices
    if "QuestionAnswering" in kind:
        return span_loss([row] * micro_batch, [(1, 2)] * micro_batch, 0, device), indices
    return classification_loss([row] * micro_batch, [0] * micro_batch, model.config.num_labels, 0, device), indices
