"""Do model, tokenizer and lengths belong together? Asked before any data are read."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from adalora_dist.backbones.parts import input_embeddings, is_under, tower_names
from adalora_dist.io.errors import UserError
from adalora_dist.sharding.tensors import full_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_POSITIONS = re.compile(r"wpe|pos(ition)?s?_?emb\w*|(word_)?position_embeddings?|embed_positions?|positions_embed")
"""Names of tables with a row for each position. Relative ones (T5's, DeBERTa's) have other names, and no end."""
_TABLE_BUFFERS = ("embed_positions", "pos_encoding")
"""Tables that are computed once, for as many positions as the model was made for (GPT-J, CodeGen, CTRL)."""


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: PAD, else EOS, else 0. Any id is right: padding is masked in attention and labels."""
    tokens: tuple[int | None, ...] = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in tokens if token is not None), 0)


def fit_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the model's configuration name the id that batches are padded with: the tokenizer's.

    Decoders as classifiers find a text's last token by it. It is part of what is trained, and so of the merged model.

    Raises:
        UserError: the tokenizer has tokens that the model has no embedding for; or the model counts positions from
            another padding id.
    """
    weight: Any = getattr(input_embeddings(model), "weight", None)
    if weight is not None:
        num_rows = full_shape(weight)[0]
        beyond = sorted((id_, token) for token, id_ in tokenizer.get_vocab().items() if id_ >= num_rows)
        if beyond:
            named = ", ".join(f"{token!r:.40} = {id_}" for id_, token in beyond[:3])
            raise UserError(
                f"the tokenizer has {len(beyond)} tokens beyond the model's {num_rows} embeddings ({named}): use the "
                "model's own tokenizer, or resize_token_embeddings(len(tokenizer)) and save_pretrained"
            )
    padding = padding_token(tokenizer)
    for name, module in model.named_modules():
        first = getattr(module, "padding_idx", None)
        if first not in (None, padding) and _counts_from_padding(name, module):
            raise UserError(
                f"the tokenizer pads with id {padding}, but the model counts positions from its own, {first} (in "
                f"{name}): set the tokenizer's pad_token to {tokenizer.convert_ids_to_tokens(first)!r}"
            )
    for config in _text_configs(model.config):
        config.pad_token_id = padding


def _text_configs(config: Any) -> list[Any]:
    """The model's configuration, and what it has for text: heads ask either."""
    try:
        inner = config.get_text_config()
    except ValueError:  # several: such a model has no one head for its text
        return [config]
    return [config] if inner is config else [config, inner]


def _counts_from_padding(name: str, module: nn.Module) -> bool:
    """RoBERTa, MPNet, M2M100: positions begin behind the padding id."""
    return _POSITIONS.fullmatch(name.rpartition(".")[2]) is not None or "Position" in type(module).__name__


def compare_classes(own: Mapping[int, str], wanted: Mapping[int, str]) -> None:
    """Warn where a head that is loaded gives the task's classes other numbers than the rows do (id2label of both).

    It is trained to the task's, and named so in what is written; what it scores before is of other classes.
    """
    before, after = ({number: str(name).casefold() for number, name in names.items()} for names in (own, wanted))
    if before != after and sorted(before.values()) == sorted(after.values()):
        said = (", ".join(f"{number} {names[number]}" for number in sorted(names)) for names in (own, wanted))
        logger.warning(
            "the model's head has the classes %s, and the task %s: scores before training mean nothing, and training "
            "begins with confused classes",
            *said,
        )


class Limit(NamedTuple):
    """Of a length in tokens."""

    length: int
    """The most tokens."""
    where: str
    """The module whose table ends there; empty: none does, the model was trained on as many."""


def position_limits(model: PreTrainedModel) -> dict[str, Limit]:
    """The longest sequence for each side of the model: "source" and "target", or "" where there is one side.

    A side without an end (relative positions of T5 and DeBERTa, ALiBi) has no entry.
    """
    config = model.config
    towers = tower_names(model)
    two_sides = bool(getattr(config, "is_encoder_decoder", False))
    limits: dict[str, Limit] = {}
    for name, module in model.named_modules():
        if is_under(name, towers):
            continue
        side = ("target" if "decoder" in name else "source" if "encoder" in name else "") if two_sides else ""
        for length, where in _tables(name, module):
            for each in [side] if side or not two_sides else ["source", "target"]:
                if each not in limits or length < limits[each].length:
                    limits[each] = Limit(length, where)
    trained_on = _trained_on(config)
    for side in ("source", "target") if two_sides else ("",):
        if side in limits:
            found = limits[side]
            limits[side] = Limit(min(found.length, trained_on or found.length), found.where)
        elif trained_on is not None and _is_rotary(model):
            limits[side] = Limit(trained_on, "")
    return limits


def _tables(name: str, module: nn.Module) -> list[tuple[int, str]]:
    """(positions, name) of the tables that a module is or has."""
    if isinstance(module, nn.Embedding) and _POSITIONS.fullmatch(name.rpartition(".")[2]):
        first: Any = getattr(module, "offset", None)  # BART: positions begin at 2
        if not isinstance(first, int):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
        return [(module.num_embeddings - first, name)]
    own = {**dict(module.named_buffers(recurse=False)), **module.__dict__}
    tables = [(leaf, own[leaf]) for leaf in _TABLE_BUFFERS if getattr(own.get(leaf), "ndim", 0) == 2]
    return [(table.shape[0], f"{name}.{leaf}") for leaf, table in tables]


def _trained_on(config: Any) -> int | None:
    for settings in _text_configs(config)[::-1]:
        length = getattr(settings, "max_position_embeddings", None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def _is_rotary(model: nn.Module) -> bool:
    return any("rotary" in type(module).__name__.lower() for module in model.modules())


class Length(NamedTuple):
    """The most tokens that a run puts through one side of a model."""

    setting: str
    tokens: int
    side: str
    """As in :func:`position_limits`."""


def lengths_of(config: Any) -> list[Length]:
    """What the settings of a recipe allow: lengths of rows, and of generated texts where they are the decoder's own."""
    settings = {**dict(config.data), **dict(config.evaluation)}
    two_sides = {"max_source_length": "source", "max_target_length": "target", "max_new_tokens": "target"}
    sides = two_sides if "max_source_length" in settings else {"max_length": "", "max_new_tokens": ""}
    # None, a reply's own length, stays within max_length.
    return [Length(name, settings[name], side) for name, side in sides.items() if settings.get(name) is not None]


def check_lengths(model: PreTrainedModel, lengths: Sequence[Length], num_taken: int = 0) -> None:
    """Compare the longest sequences of a run with what the model can take.

    Rotary positions go on for ever, but a model knows those that it has seen: more is allowed, with a warning.

    Args:
        num_taken: positions that a prefix has, and no text.

    Raises:
        UserError: one is longer than the model has positions for it.
    """
    limits = position_limits(model)
    for setting, tokens, side in lengths:
        limit = limits.get(side)
        if limit is None or tokens + num_taken <= limit.length:
            continue
        name, room = type(model).__name__, limit.length - num_taken
        flag = f"--{setting.replace('_', '-')} {room}" if room > 0 else f"--prefix-length {limit.length - 1}"
        if limit.where:
            raise UserError(
                f"{setting}={tokens}: {name} has {_positions(limit, num_taken)}, and no more tokens can go through it: "
                f"set {flag}, or less"
            )
        logger.warning(
            "%s=%d: %s was made for %s, and may be worse beyond them: %s stays within",
            setting, tokens, name, _positions(limit, num_taken), flag,
        )  # fmt: skip


def _positions(limit: Limit, num_taken: int) -> str:
    of_prefix = f", {num_taken} of them the prefix's" if num_taken else ""
    where = f"in {limit.where}" if limit.where else "max_position_embeddings"
    return f"{limit.length} positions ({where}){of_prefix}"


class Reply(NamedTuple):
    """What a model is to write behind a prompt, and how long it may be."""

    setting: str
    tokens: int
    turns: int = 1
    """Of a conversation that has a reply in each."""


def check_room(model: PreTrainedModel, num_prompt_tokens: int, reply: Reply, num_taken: int = 0) -> None:
    """Compare the longest prompt of a model with one side, and replies with it, with the positions that it has.

    Args:
        num_prompt_tokens: of all turns together, without replies.
        num_taken: as of :func:`check_lengths`.

    Raises:
        UserError: they are more than the model has positions for them.
    """
    limit = position_limits(model).get("")
    needed = num_taken + num_prompt_tokens + reply.turns * reply.tokens
    if limit is None or not limit.where or needed <= limit.length:
        return
    room = (limit.length - num_taken - num_prompt_tokens) // reply.turns
    remedy = f"set --{reply.setting.replace('_', '-')} {room}, or less" if room > 0 else "shorten it"
    in_turns = f" in each of {reply.turns} turns" if reply.turns > 1 else ""
    raise UserError(
        f"{reply.setting}={reply.tokens}{in_turns} behind the longest prompt of the evaluation, {num_prompt_tokens} "
        f"tokens: {type(model).__name__} has {_positions(limit, num_taken)}: {remedy}"
    )
